"""One thing is made ready while another is being used, and no more than one."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.ahead import one_ahead, several_ahead

TIMEOUT = 60  # seconds, after which a thread that should have come this far never will


@given(st.lists(st.integers()), st.integers(1, 4))
def test_results_come_in_order(inputs: list[int], count: int) -> None:
    assert list(one_ahead(lambda number: number * 2, inputs)) == [number * 2 for number in inputs]
    assert list(several_ahead(lambda number: number * 2, inputs, count)) == [number * 2 for number in inputs]


def test_several_are_made_at_a_time() -> None:
    """Three meet at a barrier, so none would come were fewer made at a time."""
    barrier = threading.Barrier(3, timeout=TIMEOUT)

    def make(number: int) -> int:
        barrier.wait()
        return number

    assert list(several_ahead(make, range(6), 3)) == list(range(6))


def test_the_next_is_made_while_the_last_is_used() -> None:
    """Each call waits until the result before it is in use, so nothing would come were they made in turn."""
    in_use = [threading.Event() for _ in range(4)]

    def make(number: int) -> int:
        assert number == 0 or in_use[number - 1].wait(TIMEOUT)
        return number

    for number in one_ahead(make, range(4)):
        in_use[number].set()


def test_no_more_than_one_is_made_ahead() -> None:
    """What is made is in memory: while result n is in use, n + 1 is made, and n + 2 is not begun."""
    begun: list[int] = []
    has_begun = [threading.Event() for _ in range(6)]

    def make(number: int) -> int:
        begun.append(number)
        has_begun[number].set()
        return number

    def inputs() -> Iterator[int]:
        for number in range(6):
            taken.append(number)
            yield number

    taken: list[int] = []
    for number in one_ahead(make, inputs()):
        following = min(number + 1, 5)
        assert has_begun[following].wait(TIMEOUT)
        assert begun == taken == list(range(following + 1))


def test_nothing_is_made_before_it_is_asked_for() -> None:
    begun: list[int] = []
    results = one_ahead(begun.append, range(3))

    assert begun == []
    next(results)
    results.close()
    assert begun in ([0], [0, 1])


def test_they_are_made_in_one_other_thread() -> None:
    threads = set(one_ahead(lambda _: threading.get_ident(), range(5)))

    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_an_error_is_raised_where_its_result_would_have_come() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    results = one_ahead(make, range(5))

    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert list(results) == []


def test_an_error_of_the_inputs_is_raised() -> None:
    def inputs() -> Iterator[int]:
        yield 0
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(one_ahead(lambda number: number, inputs()))


@pytest.mark.parametrize("used", [0, 1, 3])
def test_who_stops_early_leaves_no_thread(used: int) -> None:
    before = set(threading.enumerate())
    results = one_ahead(lambda number: number, range(1000))
    for _ in range(used):
        next(results)

    results.close()

    assert set(threading.enumerate()) == before


def test_after_the_last_there_is_no_thread() -> None:
    before = set(threading.enumerate())

    assert list(one_ahead(str, range(3))) == ["0", "1", "2"]

    assert set(threading.enumerate()) == before
