"""Signals of tests that run in pytest's own process, which no signal may end."""

import signal

import dpo_fast.interrupts


def send(number: signal.Signals) -> None:
    """Give a signal to the handler of the run that is going on, as Python would between two of its instructions.

    A real one would end the process of the tests, and the tests that wait in it, if no run handled it: real ones are
    for processes of their own, as in test_interrupts.
    """
    handler = signal.getsignal(number)
    assert callable(handler), f"nobody handles {number.name}"
    assert handler.__module__ == dpo_fast.interrupts.__name__, f"{handler} handles {number.name}"
    handler(number, None)
