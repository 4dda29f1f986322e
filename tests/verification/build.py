"""Scorings made by hand or drawn: an original, and what other scorings of it are off by."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from dpo_fast.verification.types import COMPLETIONS, Pairs, ScoredTokens, Scoring, Scorings

Fault = Callable[[str, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
FLOAT32_NOISE = 1e-6  # nats a token: what ONNX Runtime's float32 is from PyTorch's
BFLOAT16_NOISE = 2e-2  # nats a token: what bfloat16 is from float32


def make_tokens(lists, **optional) -> ScoredTokens:
    """A branch from a list of log-probs a completion, and of whatever else is given."""
    values = {"log_probs": lists, **optional}
    arrays = {
        name: np.array([value for each in lists_of for value in each], np.float32) for name, lists_of in values.items()
    }
    return ScoredTokens(offsets=np.cumsum([0, *map(len, lists)]), **arrays)


def make_scoring(rows, *branches) -> Scoring:
    """A scoring from a list of log-probs a completion, for two or four branches."""
    return Scoring(np.array(rows), *map(make_tokens, branches))


def make_scorings(original: Scoring, engine: Scoring, prompt: int = 3, **settings) -> Scorings:
    """Two scorings of pairs with prompts of one length, the original having no noise."""
    pairs = Pairs(
        original.rows,
        np.full(len(original.rows), prompt),
        original.policy_chosen.lengths,
        original.policy_rejected.lengths,
        settings.pop("subsets", None),
    )
    defaults = {"reshaped": original, "rounded": None, "beta": 0.1}
    return Scorings(pairs=pairs, original=original, engine=engine, **(defaults | settings))


def draw_pairs(random: np.random.Generator, pairs: int, longest: int = 24) -> Pairs:
    """Pairs with prompts and completions of various lengths, in two subsets."""
    lengths = random.integers(4, longest + 1, size=(3, pairs))
    return Pairs(np.arange(1, pairs + 1), *lengths, subsets=random.choice(["code", "prose"], pairs).tolist())


def draw_original(random: np.random.Generator, pairs: Pairs, spread: float = 1.5) -> Scoring:
    """An original whose policy prefers some 70 % of the chosen completions; margins of several nats."""
    branches = {}
    for name in COMPLETIONS:
        lengths = pairs.scored_lengths(name.partition("_")[2])
        opinion = random.normal(0.3 if name == "policy_chosen" else 0.0, 0.4, len(lengths))
        log_probs = -random.gamma(1.5, spread, int(lengths.sum())) - 0.05
        if name.startswith("policy"):
            log_probs = np.minimum(log_probs + np.repeat(opinion, lengths), -1e-3)
        branches[name] = ScoredTokens(
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            log_probs=log_probs.astype(np.float32),
            is_top1=(log_probs > -0.7).astype(np.float32),
            entropy=np.abs(log_probs).astype(np.float32),
            log_sum_sq_prob=(2 * log_probs).astype(np.float32),
        )
    return Scoring(pairs.rows, **branches)


def perturb(
    random: np.random.Generator, pairs: Pairs, scoring: Scoring, noise: float, fault: Fault | None = None
) -> Scoring:
    """Another scoring: Laplace errors of a mean size, in nats a token, and a fault on top of them.

    Args:
        random: draws.
        pairs: what is scored.
        scoring: the original.
        noise: mean absolute error of a token.
        fault: further errors, from the completions' name, the tokens' pairs and their places in the completion.
    """
    changed = {}
    for name, tokens in scoring.completions().items():
        errors = random.laplace(0, noise, len(tokens.log_probs))
        if fault is not None:
            pair = np.repeat(np.arange(len(pairs.rows)), tokens.lengths)
            within = np.arange(len(tokens.log_probs)) - np.repeat(tokens.offsets[:-1], tokens.lengths)
            errors = errors + fault(name, pair, within, random)
        log_probs = np.minimum(tokens.log_probs + errors, 0).astype(np.float32)
        changed[name] = replace(tokens, log_probs=log_probs)
    return replace(scoring, **changed)


def draw_scorings(
    seed: int,
    pairs: int = 400,
    *,
    engine_noise: float = FLOAT32_NOISE,
    rounded_noise: float | None = None,
    fault: Fault | None = None,
    longest: int = 24,
    **settings,
) -> Scorings:
    """An original with float32's noise, perhaps a rounded one, and an engine."""
    random = np.random.default_rng(seed)
    drawn = draw_pairs(random, pairs, longest)
    original = draw_original(random, drawn)
    return Scorings(
        pairs=drawn,
        original=original,
        reshaped=perturb(random, drawn, original, FLOAT32_NOISE / 10),
        rounded=None if rounded_noise is None else perturb(random, drawn, original, rounded_noise),
        engine=perturb(random, drawn, original, engine_noise, fault),
        **settings,
    )


def replace_branch(scoring: Scoring, name: str, **changes) -> Scoring:
    """The same scoring with other arrays in one branch."""
    return replace(scoring, **{name: replace(getattr(scoring, name), **changes)})


def outcomes(verification) -> Mapping[str, str]:
    """Each check's outcome by its name."""
    return {check.name: check.outcome for check in verification.checks}
