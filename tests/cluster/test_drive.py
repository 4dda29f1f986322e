"""Handing out parts, without Ray: when a pass is over."""

from collections.abc import Iterator, Sequence
from itertools import count
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_fast.cluster import drive
from dpo_fast.cluster.drive import Crew, _hand_out, _Watch


class GivesUp(_Watch):
    """Gives up one worker of a stage at each look."""

    def begin_pass(self, sizes: Sequence[int]) -> None:
        self.given_up.clear()

    def look(self) -> None:
        self.given_up[1] += 1


@pytest.mark.parametrize(("parts", "looks"), [(5, 3), (2, 2)])
def test_a_pass_is_over_when_a_stage_has_lost_all_its_workers(
    monkeypatch: pytest.MonkeyPatch, parts: int, looks: int
) -> None:
    """Ray Data starts no others, and would wait for them without an end."""
    ended = Event()

    def iter_rows() -> Iterator[dict[str, Any]]:
        ended.wait()
        return iter(())

    monkeypatch.setattr(drive, "_pipeline", lambda *_: SimpleNamespace(iter_rows=iter_rows))
    monkeypatch.setattr(drive, "LOOK_SECONDS", 0.01)
    crew = Crew(sizes=[1, 3], resources={}, patience=1.0, attempts=1)
    watch, asked = GivesUp(None, crew), count()

    job: Any = SimpleNamespace()
    outcomes = list(_hand_out(job, crew, None, range(parts), watch, lambda: next(asked) > 500))

    ended.set()
    assert outcomes == []
    assert watch.given_up == {1: looks}  # of three workers, or of as many as there are parts
