"""Samples: what policy and reference answer to the same prompts, by Transformers' `generate` on the saved weights.

rows -> prompts -> policy, reference -> samples -> samples.jsonl, table, trackers
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.errors import UsageError
from dpo_fast.generation.completion import Completion, Sampling, complete, generation_settings
from dpo_fast.generation.files import Sample
from dpo_fast.generation.prompts import DrawnPrompts, draw_prompts
from dpo_fast.generation.weights import SavedWeights
from dpo_fast.provenance import PACKAGES, hardware, versions
from dpo_fast.types import OnError

# Of the generation config, what is written beside the samples.
RECORDED = ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "repetition_penalty", "eos_token_id")


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What a user can choose about samples.

    Attributes:
        num_samples: prompts that are answered.
        sampling: how tokens are drawn.
        seed: of the choice of prompts, and of the draws.
        split: of a data set that has several.
        limit: only the first rows.
        on_error: what a drawn row that cannot be used does: "stop", or be a "skip".
        max_length: of prompt and completion together, in tokens, as for an evaluation; None takes the bundle's.
        trust_remote_code: whether the checkpoints' own Python code may be run.
    """

    num_samples: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    split: str | None = None
    limit: int | None = None
    on_error: OnError = "stop"
    max_length: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Generated:
    """The samples in the data set's order, and what they were made from (the content of samples.json)."""

    samples: list[Sample]
    provenance: dict[str, Any]


def generate(
    bundle: Path,
    dataset: str,
    options: GenerateOptions = GenerateOptions(),
    report: Callable[[str], None] = lambda step: None,
) -> Generated:
    """Let policy and reference answer the same prompts.

    The policy's generation config holds for both, so that they differ by their weights alone. On one machine, the same
    seed gives the same texts, whatever the number of samples.

    Args:
        bundle: what `dpo_fast.export` wrote.
        dataset: a file, a folder or a Hub id.
        options: see `GenerateOptions`.
        report: called with a line at each step.

    Raises:
        InputError: bundle, data set, options or weights; the message says what to do.
    """
    check_options(options)
    opened = open_bundle(bundle)
    max_length = _max_length(opened, options)
    opened.verify()
    drawn = draw_prompts(
        opened,
        dataset,
        options.num_samples,
        seed=options.seed,
        max_length=max_length,
        split=options.split,
        limit=options.limit,
        on_error=options.on_error,
        trust_remote_code=options.trust_remote_code,
    )
    if len(drawn.prompts) < options.num_samples:
        report(f"{len(drawn.prompts)} samples instead of {options.num_samples}: the data set has no more prompts")
    roles = [role for role in (POLICY, REFERENCE) if role in opened.manifest.models]
    limits = [entry.max_positions for entry in opened.manifest.models.values() if entry.max_positions is not None]
    weights = SavedWeights(opened, trust_remote_code=options.trust_remote_code)
    said: dict[str, list[Completion]] = {}
    settings = None
    try:
        for role in roles:
            report(f"{role}: answering {len(drawn.prompts)} prompts")
            with weights.of(role) as model:
                settings = settings or generation_settings(model, drawn.tokenizer, options.sampling)
                said[role] = [
                    complete(
                        model,
                        drawn.tokenizer,
                        prompt.ids,
                        settings,
                        seed=(options.seed, prompt.row),
                        positions=min(limits, default=None),
                    )
                    for prompt in drawn.prompts
                ]
            del model  # whoever holds it keeps its memory
    finally:
        weights.close()
    used = {name: getattr(settings, name) for name in RECORDED}
    return Generated(_samples(drawn, said), _provenance(opened, options, drawn, used, max_length))


def check_options(options: GenerateOptions) -> None:
    """Refuse values that no data set could make sense of.

    Raises:
        UsageError: with the option and its value.
    """
    sampling = options.sampling
    counts = {"--num-samples": options.num_samples, "--max-new-tokens": sampling.max_new_tokens}
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"{name} {value} must be at least 1")
    if sampling.temperature is not None and not 0 <= sampling.temperature < float("inf"):
        raise UsageError(f"--temperature {sampling.temperature:g} must be 0 (greedy) or above")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise UsageError(f"--top-p {sampling.top_p:g} must be above 0, and 1 at most")
    if sampling.top_k is not None and sampling.top_k < 0:
        raise UsageError(f"--top-k {sampling.top_k} must be at least 0, which takes every token")
    drawing = bool(sampling.temperature) or sampling.top_p is not None or sampling.top_k is not None
    if drawing and (sampling.greedy or sampling.temperature == 0):
        said = "--greedy" if sampling.greedy else "--temperature 0"
        raise UsageError(f"{said} draws nothing: leave the other settings of the draw out")
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} must be at least 0")


def _max_length(bundle: Bundle, options: GenerateOptions) -> int:
    """The truncation in tokens, within every model's positions."""
    if options.max_length is None:
        return bundle.manifest.max_length
    if options.max_length < 2:
        raise UsageError(f"--max-length {options.max_length} leaves no room for a prompt and a completion")
    for role, entry in bundle.manifest.models.items():
        if entry.max_positions is not None and options.max_length > entry.max_positions:
            raise UsageError(
                f"--max-length {options.max_length}: the {role} has positions for {entry.max_positions} tokens"
            )
    return options.max_length


def _samples(drawn: DrawnPrompts, said: dict[str, list[Completion]]) -> list[Sample]:
    """Prompts and completions side by side."""
    references: list[Completion | None] = [*said.get(REFERENCE, [None] * len(drawn.prompts))]
    return [
        Sample(
            row=prompt.row,
            prompt=prompt.text,
            policy=policy.text,
            reference=None if reference is None else reference.text,
            policy_tokens=policy.tokens,
            reference_tokens=None if reference is None else reference.tokens,
            policy_finished=policy.finished,
            reference_finished=None if reference is None else reference.finished,
        )
        for prompt, policy, reference in zip(drawn.prompts, said[POLICY], references, strict=True)
    ]


def _provenance(
    bundle: Bundle, options: GenerateOptions, drawn: DrawnPrompts, used: dict[str, Any], max_length: int
) -> dict[str, Any]:
    """What the samples were made from."""
    return {
        "samples": len(drawn.prompts),
        "asked_for": asdict(options),
        "generation_config": used,
        "max_length": max_length,
        "skipped": [asdict(row) for row in drawn.skipped],
        "rows_without_prompt": drawn.without_prompt,
        "dataset": drawn.dataset,
        "models": {
            role: {
                "source": entry.source,
                "revision": entry.revision,
                "weights_and_graph_sha256": bundle.role_hashes(role),
            }
            for role, entry in bundle.manifest.models.items()
        },
        "versions": versions((*PACKAGES, "torch", "peft")),
        "hardware": hardware(),
    }
