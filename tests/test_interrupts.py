"""Real signals, to processes of their own, which say what came of them."""

import signal
import subprocess
import sys
import threading
from types import FrameType

import pytest

from dpo_fast.interrupts import SIGNALS, stop_on_signals

# What is the same everywhere, whatever the tests' own process ignores.
PROLOGUE = """
import signal
from dpo_fast.interrupts import stop_on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
def say(text):
    print(text, flush=True)
"""


def run(code: str) -> tuple[int, str]:
    """The exit code, and what it said, in one line."""
    done = subprocess.run([sys.executable, "-c", PROLOGUE + code], capture_output=True, text=True, check=False)
    return done.returncode, " ".join(done.stdout.split())


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_noted_and_the_second_breaks_off(number: signal.Signals) -> None:
    code, said = run(f"""
with stop_on_signals() as stop:
    signal.raise_signal({number:d})
    say(stop.signal.name)
    try:
        signal.raise_signal({number:d})
    except KeyboardInterrupt:
        say("broken off")
    say("after")
""")

    if number is signal.SIGINT:
        assert (code, said) == (0, "SIGINT broken off after")
    else:
        assert (code, said) == (-signal.SIGTERM, "SIGTERM")


def test_of_two_calls_one_in_the_other_both_know_and_the_second_signal_breaks_off_both() -> None:
    """The inner one may have looked for the last time when the first signal comes."""
    code, said = run("""
try:
    with stop_on_signals() as outer:
        with stop_on_signals() as inner:
            signal.raise_signal(signal.SIGINT)
        say(outer.signal.name)
        with stop_on_signals() as another:
            say(another.signal.name)
            signal.raise_signal(signal.SIGINT)
            say("not reached")
except KeyboardInterrupt:
    say("broken off")
with stop_on_signals() as fresh:
    say(fresh.signal)
say(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
""")

    assert (code, said) == (0, "SIGINT SIGINT broken off None True")


def test_one_that_comes_while_nothing_may_be_raised_is_not_lost() -> None:
    """As within the collection of garbage, where an exception is reported and forgotten."""
    code, said = run("""
class Garbage:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
with stop_on_signals() as stop:
    Garbage()
    say(stop.signal.name)
""")

    assert (code, said) == (0, "SIGINT")


def test_handlers_are_put_back_whatever_happens() -> None:
    def mine(number: int, frame: FrameType | None) -> None:
        raise AssertionError

    def fail() -> None:
        with stop_on_signals():
            assert all(signal.getsignal(number) is not mine for number in SIGNALS)
            raise ValueError("broken")

    before = {number: signal.signal(number, mine) for number in SIGNALS}
    try:
        with pytest.raises(ValueError, match="broken"):
            fail()
        assert all(signal.getsignal(number) is mine for number in SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_handler_that_python_cannot_put_back_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that a library in C installed, Python says None."""
    kept = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signal, "getsignal", {signal.SIGINT: None, signal.SIGTERM: signal.SIG_DFL}.get)
    with stop_on_signals():
        pass
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is kept


def test_in_another_thread_nothing_is_handled_and_nothing_is_shared() -> None:
    seen = []

    def look() -> None:
        before = [signal.getsignal(number) for number in SIGNALS]
        with stop_on_signals() as stop:
            seen.append((stop.signal, [signal.getsignal(number) for number in SIGNALS] == before))

    with stop_on_signals() as stop:
        stop.signal = signal.SIGTERM
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    assert seen == [(None, True)]
