"""Both models, one after the other, several turns each: what every contender's process does and says."""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dpo_fast.types import Float64Array

Result = TypeVar("Result")


def timed_turns(score: Callable[[], Result], turns: int) -> tuple[Result, list[float]]:
    """Score once, which sets everything up, and then so many times.

    Args:
        score: returns when all is computed.
        turns: how many come after the first.

    Returns:
        What the last turn gave, and the seconds of each, the first included.
    """
    seconds = []
    for _ in range(1 + turns):
        started = time.perf_counter()
        result = score()
        seconds.append(time.perf_counter() - started)
    return result, seconds


def score_both(
    score_role: Callable[[str], tuple[Float64Array, list[float]]],
    roles: Sequence[str],
    log_probs: Path,
    started: float,
) -> dict[str, Any]:
    """Score P pairs under each model, one in memory at a time.

    Args:
        score_role: loads a role's model, scores all pairs in turns, and lets go of it; gives (P, 2) nats, chosen and
            rejected, and the seconds of each turn, the first included.
        roles: policy, then reference.
        log_probs: file to write, (P, 4) float64: the policy's chosen and rejected, then the reference's.
        started: when the process was, in seconds since the epoch.

    Returns:
        `score_seconds` (the fastest turn of each model), `first_seconds` (the first turn, which sets everything up),
        `turn_seconds` and `wall_seconds`: from the start of the process, as if there were only the first turn.
    """
    sums, seconds = [], []
    for role in roles:
        of_role, times = score_role(role)
        gc.collect()
        sums.append(of_role)
        seconds.append(times)
    np.save(log_probs, np.concatenate(sums, axis=1))
    return summarise(seconds, time.time() - started)


def summarise(seconds: Sequence[Sequence[float]], process_seconds: float) -> dict[str, Any]:
    """Seconds as `score_both` returns them, from each model's turns, the first included."""
    later = [times[1:] for times in seconds]
    return {
        "score_seconds": sum(min(times) for times in later),
        "first_seconds": sum(times[0] for times in seconds),
        "turn_seconds": [list(times) for times in later],
        "wall_seconds": process_seconds - sum(map(sum, later)),
    }
