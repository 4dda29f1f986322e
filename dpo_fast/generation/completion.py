"""One completion of one prompt, by Transformers' `generate`.

One prompt at a time, each with a seed of its own: a text depends on weights, prompt, settings and seed alone, not on
what else is sampled, and no padding is in its way. Policy and reference draw from the same random numbers.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from dpo_fast.errors import CheckpointError
from dpo_fast.generation.prompts import decode
from dpo_fast.quiet import quiet
from dpo_fast.text import named_line

# What Transformers samples with where a checkpoint says nothing.
TEMPERATURE, TOP_P, TOP_K = 1.0, 1.0, 50


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; None takes what the policy's generation_config.json says, or Transformers' own default.

    Attributes:
        max_new_tokens: after which a completion is cut off.
        temperature: of the softmax; 0 is greedy.
        top_p: the smallest set of tokens with so much probability is drawn from.
        top_k: so many tokens are drawn from; 0: all.
        greedy: the most probable token always, no draw.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model answered.

    Attributes:
        text: without special tokens.
        tokens: how many were generated, a closing one included.
        finished: whether the model ended it, and not `max_new_tokens` or the model's positions.
    """

    text: str
    tokens: int
    finished: bool


def generation_settings(model: Any, tokenizer: Any, sampling: Sampling) -> GenerationConfig:
    """The model's own generation config, with what the user says in its place.

    One completion, without beams and clocks. It ends at any of the config's end-of-sequence tokens, and at the
    tokenizer's, which preferences are trained with.

    Args:
        model: a Transformers model.
        tokenizer: the policy's.
        sampling: what the user says.
    """
    settings: GenerationConfig = copy.deepcopy(model.generation_config)
    ends = settings.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    pads = (settings.pad_token_id, tokenizer.pad_token_id, *ends)
    greedy = sampling.greedy or sampling.temperature == 0
    if (sampling.temperature, sampling.top_p, sampling.top_k) == (None, None, None):
        greedy = greedy or settings.temperature == 0  # as some checkpoints write it

    def drawn(name: str, default: float) -> float | None:
        """A sampling setting; none where nothing is drawn."""
        said, own = getattr(sampling, name), getattr(settings, name)
        return None if greedy else said if said is not None else own if own is not None else default

    settings.update(
        do_sample=not greedy,
        temperature=drawn("temperature", TEMPERATURE),
        top_p=drawn("top_p", TOP_P),
        top_k=drawn("top_k", TOP_K),
        max_new_tokens=sampling.max_new_tokens,
        max_length=None,
        max_time=None,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        eos_token_id=ends or None,
        pad_token_id=next((pad for pad in pads if pad is not None), None),
    )
    return settings


def complete(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    settings: GenerationConfig,
    *,
    seed: tuple[int, int],
    positions: int | None,
) -> Completion:
    """Continue a prompt of T tokens.

    Args:
        model: a Transformers model; its own generation config gives way to `settings`.
        tokenizer: the policy's.
        prompt: token ids.
        settings: see `generation_settings`.
        seed: of the draws: the user's, and the row's number.
        positions: the longest sequence that the model has positions for, in tokens, or None.

    Raises:
        CheckpointError: Transformers cannot generate with this model and this generation config.
    """
    device = model.device
    limit = settings.max_new_tokens
    if positions is not None:
        limit = min(limit, positions - len(prompt))
    own = model.generation_config
    # `generate` fills what is None from the model's own config, which may be another than the policy's.
    model.generation_config = settings
    try:
        with quiet(), torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
            ids = torch.tensor([prompt], device=device)  # (1, T)
            limited = copy.deepcopy(settings)
            limited.max_new_tokens = limit
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=limited, tokenizer=tokenizer
            )  # (1, T + generated)
    except Exception as error:  # NaN weights, a generation config that means nothing, want of memory
        raise CheckpointError(
            f"{type(model).__name__}: Transformers cannot generate with it ({named_line(error)}); see the policy's "
            "generation_config.json, and whether `dpo-fast verify` passes"
        ) from error
    finally:
        model.generation_config = own
    answer = output[0, len(prompt) :].tolist()
    ended = len(answer) < limit or answer[-1] in (settings.eos_token_id or [])
    return Completion(decode(tokenizer, answer), len(answer), ended)
