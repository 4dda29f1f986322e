"""The ledger alone: who is blamed, who is silent, how far it is."""

from collections.abc import Sequence

import pytest

from dpo_fast.cluster.ledger import START_SECONDS, Ledger

PATIENCE = 10.0


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    ledger = open_ledger(clock, [2])
    start(ledger, "a")
    start(ledger, "b")
    return ledger


def open_ledger(clock: Clock, sizes: Sequence[int]) -> Ledger:
    """Of a first pass."""
    ledger = Ledger(attempts=2, clock=clock)
    ledger.begin_pass(sizes)
    return ledger


def start(ledger: Ledger, worker: str) -> None:
    ledger.started(worker, 0, "host", "node", 1, f"handle of {worker}")
    ledger.ready(worker)


def test_the_part_on_the_engine_is_blamed_and_the_one_beside_it_is_not(ledger: Ledger) -> None:
    for worker in ("a", "b"):
        assert ledger.begin(worker, 1) is None
        assert ledger.begin(worker, 2) is None
        ledger.on_engine(worker, 1)
        start(ledger, worker)  # it died, and Ray has started it again

    assert ledger.begin("a", 1) == "its worker died or hung 2 times"
    assert ledger.begin("b", 1) == "its worker died or hung 2 times"
    assert ledger.refused() == {1}
    assert ledger.begin("a", 2) is None


@pytest.mark.parametrize(("attempts", "deaths"), [(1, 1), (2, 1), (3, 2), (5, 4)])
def test_the_last_attempt_is_another_workers(clock: Clock, attempts: int, deaths: int) -> None:
    """Ray gives a part to the one that died at it, whose device may be to blame."""
    ledger = Ledger(attempts, clock)
    ledger.begin_pass([1])
    start(ledger, "a")
    for _ in range(deaths):
        assert ledger.begin("a", 1) is None
        start(ledger, "a")
    times = "once" if deaths == 1 else f"{deaths} times"
    assert ledger.begin("a", 1) == f"its worker died or hung {times}"
    assert ledger.begin("a", 2) is None

    ledger.begin_pass([1])
    start(ledger, "b")

    assert (ledger.begin("b", 1) is None) == (attempts > 1)
    start(ledger, "b")
    assert ledger.refused() == {1}


def test_where_nothing_is_on_the_engine_all_that_were_prepared_are_blamed(ledger: Ledger) -> None:
    for worker in ("a", "b"):
        ledger.begin(worker, 1)
        ledger.begin(worker, 2)
        ledger.give_up(worker)
        start(ledger, "a")

    assert ledger.begin("a", 1) is not None
    assert ledger.begin("a", 2) is not None


def test_a_part_that_was_ended_is_not_blamed(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.begin("a", 1)
        ledger.on_engine("a", 1)
        ledger.end("a", 1, 0, 8.0)
        start(ledger, "a")

    assert ledger.begin("a", 1) is None


def test_a_part_that_is_ended_twice_counts_once(ledger: Ledger) -> None:
    for worker in ("a", "b"):
        ledger.begin(worker, 1)
        ledger.on_engine(worker, 1)
    ledger.progress("a", 1, 3.0, 100)
    assert ledger.snapshot(PATIENCE).pairs == 3.0
    ledger.end("a", 1, 0, 8.0)
    ledger.end("b", 1, 0, 8.0)
    ledger.end("b", 1, 1, 8.0)  # another stage of the work

    assert ledger.snapshot(PATIENCE).pairs == 16.0
    assert ledger.snapshot(PATIENCE).tokens == 100


def test_what_a_dead_worker_had_scored_of_its_part_is_taken_back(ledger: Ledger) -> None:
    ledger.begin("a", 1)
    ledger.progress("a", 1, 3.0, 100)
    start(ledger, "a")

    assert ledger.snapshot(PATIENCE).pairs == 0.0
    assert ledger.snapshot(PATIENCE).tokens == 100  # its speed was real


def test_who_has_something_to_do_and_says_nothing_is_silent(ledger: Ledger, clock: Clock) -> None:
    ledger.begin("a", 7)
    clock.now = PATIENCE + 1
    assert [(s.worker, s.stage, s.handle, s.what) for s in ledger.snapshot(PATIENCE).silent] == [
        ("a", 0, "handle of a", "preparing part 7")
    ]
    ledger.on_engine("a", 7)
    assert ledger.snapshot(PATIENCE).silent == []
    clock.now += PATIENCE + 1
    assert [s.what for s in ledger.snapshot(PATIENCE).silent] == ["at part 7"]
    ledger.progress("a", 7, 1.0, 1)
    assert ledger.snapshot(PATIENCE).silent == []
    ledger.end("a", 7, 0, 8.0)
    clock.now += PATIENCE + 1
    assert ledger.snapshot(PATIENCE).silent == []  # b and a have nothing to do


def test_one_that_never_becomes_ready_is_silent_and_its_starts_are_counted(ledger: Ledger, clock: Clock) -> None:
    for number in range(3):
        ledger.started("c", 0, "host", "node", 1, None)
        assert ledger.snapshot(PATIENCE).failing_starts == number + 1
    clock.now = PATIENCE + 1
    assert [s.what for s in ledger.snapshot(PATIENCE).silent] == ["loading its engine"]
    ledger.ready("c")
    assert ledger.snapshot(PATIENCE).failing_starts == 0
    start(ledger, "c")
    ledger.started("c", 0, "host", "node", 1, None)
    assert ledger.snapshot(PATIENCE).failing_starts == 1


def test_who_cannot_load_its_engine_holds_back_as_long_as_others_may_work(ledger: Ledger) -> None:
    assert ledger.refuse("a", "no memory")
    assert ledger.refuse("a", "no memory")
    assert ledger.snapshot(PATIENCE).refusals == {"a": "host: no memory"}
    ledger.give_up("b")
    assert ledger.refuse("a", "no memory") is True  # another one may still start
    start(ledger, "c")
    ledger.refuse("c", "no memory either")
    assert not ledger.refuse("a", "no memory")
    assert ledger.snapshot(PATIENCE).refusals == {}  # none holds back
    start(ledger, "c")  # again, and all is well
    assert ledger.refuse("a", "no memory")


def test_who_cannot_load_its_engine_does_not_wait_for_ever_for_others_to_start(clock: Clock) -> None:
    """And not for those of another stage."""
    ledger = open_ledger(clock, [2, 1])
    start(ledger, "a")
    ledger.started("other stage", 1, "host", "node", 1, None)
    assert ledger.refuse("a", "no memory")
    clock.now = START_SECONDS
    assert not ledger.refuse("a", "no memory")


def test_who_fails_again_and_again_pauses_and_its_node_is_suspected_as_long_as_others_do_not_fail(clock: Clock) -> None:
    ledger = open_ledger(clock, [2])
    for worker in ("a", "b"):
        assert ledger.started(worker, 0, "host", f"node of {worker}", 1, None) is None
        ledger.ready(worker)
    assert [ledger.fail("a", "device lost") for _ in range(9)] == [0, 0, 1, 2, 4, 8, 16, 30, 30]
    assert ledger.snapshot(PATIENCE).said == [
        "a worker on host fails at one part after another, and is given fewer: device lost"
    ]
    assert ledger.started("c", 0, "host", "node of b", 1, None) is None
    reason = ledger.started("d", 0, "host", "node of a", 1, None)
    assert reason == "the last one failed at one part after another: device lost"
    assert ledger.refuse("d", reason)

    for worker in ("c", "d"):
        ledger.give_up(worker)
    assert [ledger.fail("b", "device lost") for _ in range(3)] == [0, 0, 0]  # it may well be the parts
    assert ledger.fail("a", "device lost") == 0
    ledger.end("a", 1, 0, 8.0)
    assert ledger.started("e", 0, "host", "node of a", 1, None) is None  # it has recovered


def test_who_starts_again_takes_the_parts_that_wait_for_it(clock: Clock) -> None:
    """Ray gives them to no other: if it held back, none of them would ever be ended."""
    ledger = open_ledger(clock, [2])
    for worker in ("a", "b"):
        ledger.started(worker, 0, "host", f"node of {worker}", 1, None)
        ledger.ready(worker)
    assert [ledger.fail("a", "device lost") for _ in range(4)] == [0, 0, 1, 2]

    for _ in range(2):  # its process ends before it is ready, too
        assert ledger.started("a", 0, "host", "node of a", 2, None) is None
        assert not ledger.refuse("a", "cannot load its engine")
    ledger.ready("a")

    assert ledger.snapshot(PATIENCE).refusals == {}
    assert ledger.fail("a", "device lost") == 4  # it is as suspect as it was
    assert ledger.started("c", 0, "host", "node of a", 1, None) is not None


def test_whose_process_ends_at_one_part_after_another_is_suspected(clock: Clock) -> None:
    """And not the parts; nor who dies on one node after another, or with nothing to do."""
    ledger = open_ledger(clock, [2])
    for worker in ("a", "b"):
        ledger.started(worker, 0, "host", f"node of {worker}", 1, None)
        ledger.ready(worker)
    for part in range(3):
        assert ledger.snapshot(PATIENCE).said == []
        ledger.begin("a", part)
        ledger.on_engine("a", part)
        ledger.started("a", 0, "host", "node of a", 1, None)
        assert ledger.ready("a") == (1 if part == 2 else 0)
        ledger.begin("b", part)
        ledger.started("b", 0, "host", f"another node, {part}", 1, None)
        ledger.ready("b")
        ledger.started("b", 0, "host", f"another node, {part}", 1, None)
        ledger.ready("b")

    assert ledger.snapshot(PATIENCE).said == [
        "a worker on host fails at one part after another, and is given fewer: its process ended, or hung"
    ]
    assert ledger.started("c", 0, "host", "node of a", 1, None) is not None
    assert ledger.started("d", 0, "host", "another node, 2", 1, None) is None


def test_who_is_suspected_has_one_try_at_a_part(clock: Clock) -> None:
    """Each costs a new start of its process, and is held against the part."""
    ledger = Ledger(attempts=9, clock=clock)
    ledger.begin_pass([2])
    for worker in ("a", "b"):
        start(ledger, worker)
    for part, tries in ((1, 2), (2, 1), (3, 1)):
        for _ in range(tries):
            assert ledger.begin("a", part) is None
            ledger.on_engine("a", part)
            start(ledger, "a")

    assert [ledger.begin("a", part) is None for part in (1, 2, 3, 4)] == [False, False, False, True]
    assert [ledger.begin("b", part) is None for part in (1, 2, 3, 4)] == [True] * 4


def test_a_suspected_node_is_cleared_by_any_worker_that_held_back_there(clock: Clock) -> None:
    ledger = open_ledger(clock, [2])
    for worker in ("a", "b"):
        ledger.started(worker, 0, "host", f"node of {worker}", 1, None)
    for _ in range(3):
        ledger.fail("a", "device lost")
    ledger.begin_pass([2])
    reason = ledger.started("c", 0, "host", "node of a", 1, None)
    assert reason is not None
    assert ledger.refuse("c", reason)
    clock.now = START_SECONDS  # nobody else has come
    assert not ledger.refuse("c", reason)
    ledger.ready("c")
    ledger.end("c", 1, 0, 8.0)

    assert ledger.started("d", 0, "host", "node of a", 1, None) is None


def test_nobody_is_waited_for_whom_a_pass_does_not_have(clock: Clock) -> None:
    """Few parts are left, and as few workers are asked for: the one there is had better begin."""
    ledger = open_ledger(clock, [2])
    start(ledger, "a")
    assert [ledger.fail("a", "device lost") for _ in range(3)] == [0, 0, 1]

    ledger.begin_pass([1])
    reason = ledger.started("b", 0, "host", "node", 1, None)

    assert reason is not None
    assert not ledger.refuse("b", reason)
    assert [ledger.fail("b", "device lost") for _ in range(3)] == [0, 0, 0]


def test_who_fails_before_others_have_started_waits_for_them_but_not_for_ever(clock: Clock) -> None:
    """It would be through with all parts before others have loaded their engines."""
    ledger = open_ledger(clock, [2])
    start(ledger, "a")
    assert [ledger.fail("a", "device lost") for _ in range(4)] == [0, 0, 1, 2]
    clock.now = START_SECONDS
    assert ledger.fail("a", "device lost") == 0
    ledger.started("b", 0, "host", "node", 1, None)  # it is loading its engine
    assert ledger.fail("a", "device lost") == 8
    ledger.refuse("b", "no memory")
    assert ledger.fail("a", "device lost") == 0


def test_workers_that_were_given_up_are_not_waited_for(ledger: Ledger, clock: Clock) -> None:
    ledger.begin("a", 7)
    ledger.begin_pass([2])
    clock.now = PATIENCE + 1

    snapshot = ledger.snapshot(PATIENCE)

    assert (snapshot.workers, snapshot.silent, snapshot.pairs) == (0, [], 0.0)


def test_what_is_worth_saying_is_kept_in_order(ledger: Ledger) -> None:
    """Whoever looks at it later is told the rest."""
    ledger.say("one")
    before = ledger.snapshot(0.0)
    ledger.say("two")

    assert before.said == ["one"]
    assert ledger.snapshot(0.0).said == ["one", "two"]
