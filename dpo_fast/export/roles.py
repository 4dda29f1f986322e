"""What is to be exported: each role's checkpoint, opened and refused before anything is traced or copied."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from dpo_fast.errors import CheckpointError, UsageError
from dpo_fast.export.adapters import AdaptedModules
from dpo_fast.export.checkpoint import Checkpoint, check_finite, open_checkpoint
from dpo_fast.export.sizes import Sizes, read_sizes
from dpo_fast.export.weights import Binding, match_parameters
from dpo_fast.tokens import load_tokenizer

DEFAULT_MAX_LENGTH = 1024  # tokens; TRL's default (trl/trainer/dpo_config.py)
# What a configuration says of where a checkpoint came from and how it was stored, not of its graph.
PROVENANCE_KEYS = frozenset(
    {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "_attn_implementation", "pad_token_id",
     "bos_token_id", "eos_token_id", "use_cache", "architectures"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RoleModel:
    """A role's model, opened and found fit for export.

    Attributes:
        checkpoint: what becomes the role's folder in the bundle.
        config: its configuration; an adapter's base's.
        sizes: its sizes; an adapter's base's.
        bindings: what each parameter of its graph is bound to.
        graph: its graph's file; roles of one base model share it.
        adapters: what each adapter in the graph changes.
        gates: one for each adapter, 1 on, 0 off; None where the graph has none.
        base: the model beneath the adapters.
        base_folder: the base's folder in the bundle.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    sizes: Sizes
    bindings: dict[str, Binding]
    graph: str
    adapters: tuple[AdaptedModules, ...] = ()
    gates: tuple[float, ...] | None = None
    base: Checkpoint | None = None
    base_folder: str | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies: an adapter may be read with its base's."""
        folder = self.checkpoint.folder
        return self.base.folder if self.base is not None and not has_tokenizer(folder) else folder


def open_role(name: str, revision: str | None, role: str, *, trust_remote_code: bool) -> RoleModel:
    """Find a checkpoint and refuse one that cannot be exported, before anything is traced or copied."""
    found = open_checkpoint(name, revision, trust_remote_code=trust_remote_code)
    return check_role(found, role, trust_remote_code=trust_remote_code)


def check_role(found: Checkpoint, role: str, *, trust_remote_code: bool) -> RoleModel:
    """Refuse a model that cannot be exported.

    Args:
        found: a Transformers folder.
        role: its folder in the bundle.
        trust_remote_code: whether its own Python code may be run.
    """
    if found.is_adapter:
        raise CheckpointError(
            f"{found.source}: is a PEFT adapter, where a whole model is asked for; merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )
    config = read_config(found.folder, found.source, trust_remote_code=trust_remote_code)
    bindings = match_parameters(config, found, role, trust_remote_code=trust_remote_code)
    check_finite(found)
    return RoleModel(found, config, read_sizes(config), bindings, f"{role}.onnx")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


def read_config(folder: Path, name: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """A model folder's configuration.

    Args:
        folder: that holds config.json.
        name: what the user calls it.
        trust_remote_code: whether the configuration's own Python code may be run.

    Raises:
        CheckpointError: it cannot be used, or says that the weights are quantised.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each architecture's configuration class refuses values in its own way
        needs_code = "trust_remote_code" in str(error)
        hint = "it brings its own Python code: read that, then say --trust-remote-code" if needs_code else error
        raise CheckpointError(f"{name}: config.json cannot be used: {' '.join(str(hint).split())[:300]}") from error
    if settings.get("quantization_config") is not None:
        raise CheckpointError(f"{name}: is quantised already (quantization_config); export the original weights")
    return config


def architecture(config: PretrainedConfig) -> dict[str, Any]:
    """What decides the graph: a configuration without its provenance."""
    return {key: value for key, value in config.to_dict().items() if key not in PROVENANCE_KEYS}


def check_tokenizer(model: RoleModel, *, trust_remote_code: bool) -> dict[str, int]:
    """The tokenizer's ids by token, refused if the model has no row for one of them."""
    tokenizer = load_tokenizer(model.tokenizer_folder, trust_remote_code=trust_remote_code)
    ids = tokenizer.get_vocab()
    largest = max(ids.values(), default=-1)
    if largest >= model.sizes.vocabulary:
        raise CheckpointError(
            f"{model.checkpoint.source}: the tokenizer has the id {largest}, and the model's vocabulary ends at "
            f"{model.sizes.vocabulary - 1}; is the tokenizer the model's own?"
        )
    return dict(ids)


def check_same_language(policy: RoleModel, reference: RoleModel, *, trust_remote_code: bool) -> None:
    """Refuse a policy and a reference that do not speak of the same tokens.

    A reference without a tokenizer of its own is read with the policy's, as TRL reads every reference.
    """
    if policy.sizes.vocabulary != reference.sizes.vocabulary:
        raise CheckpointError(
            f"policy and reference have different vocabularies: {policy.checkpoint.source} {policy.sizes.vocabulary}, "
            f"{reference.checkpoint.source} {reference.sizes.vocabulary}; the reference is the model that the policy "
            "was trained from"
        )
    ids = check_tokenizer(policy, trust_remote_code=trust_remote_code)
    if not has_tokenizer(reference.checkpoint.folder):
        return
    others = check_tokenizer(reference, trust_remote_code=trust_remote_code)
    _check_same_ids("policy and reference", policy.checkpoint.source, ids, reference.checkpoint.source, others)


def check_same_tokenizer(new: Path, old: Path, name: str, *, trust_remote_code: bool) -> None:
    """Refuse a new checkpoint of a policy if its tokenizer is not the one in the old checkpoint's folder.

    Args:
        new: the new checkpoint's folder.
        old: the old one's.
        name: what the user calls the new one.
        trust_remote_code: whether the tokenizers' own Python code may be run.
    """
    files = ("tokenizer.json", "tokenizer_config.json")
    if all((new / file).is_file() and (new / file).read_bytes() == (old / file).read_bytes() for file in files):
        return  # the usual case, without the time of loading both
    ids, before = (load_tokenizer(folder, trust_remote_code=trust_remote_code).get_vocab() for folder in (new, old))
    _check_same_ids("the new policy and the bundle's", name, ids, "the bundle", before)


def _check_same_ids(both: str, name: str, ids: dict[str, int], other: str, others: dict[str, int]) -> None:
    """Refuse two vocabularies in which a token has another id, or none."""
    differing = sorted(token for token in ids.keys() | others.keys() if ids.get(token) != others.get(token))
    if differing:
        token = differing[0]
        raise CheckpointError(
            f"{both} have different tokenisers: {len(differing)} tokens differ, such as {token!r} "
            f"({name}: id {ids.get(token)}, {other}: id {others.get(token)})"
        )


def choose_max_length(models: Iterable[RoleModel], wanted: int | None) -> int:
    """The bundle's truncation in tokens, within every model's positions: what is wanted, or TRL's default."""
    if wanted is not None and wanted < 2:
        raise UsageError(f"--max-length {wanted} leaves no room for a prompt and a completion")
    limits = [limit for model in models if (limit := model.sizes.positions) is not None]
    limit = min(limits, default=None)
    if limit is not None and limit < 2:
        raise CheckpointError(f"config.json says that the model has positions for {limit} tokens, which are too few")
    if wanted is None:
        return DEFAULT_MAX_LENGTH if limit is None else min(DEFAULT_MAX_LENGTH, limit)
    if limit is not None and wanted > limit:
        raise UsageError(f"--max-length {wanted}: the model has positions for {limit} tokens")
    return wanted
