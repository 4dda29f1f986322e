"""Ctrl-C and SIGTERM: finish what the engine is at, then stop in good order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether, and by which signal, a run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


_outermost: Stop | None = None  # of the main thread, while it is inside of `stop_on_signals`


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Note the first Ctrl-C or SIGTERM instead of breaking off; the second one breaks off at once.

    A call inside of another shares what the outer one notes: a signal that comes when the inner one has looked for the
    last time is not lost, and the second one breaks off both.

    In a thread other than the main one signals cannot be handled, and stay what they are.

    Yields:
        What has been noted so far.
    """
    global _outermost
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    if _outermost is not None:
        yield _outermost
        return
    stop = Stop()
    # A handler that was not installed from Python, and of which Python cannot tell, is None; it cannot be put back.
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not None}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    _outermost = stop
    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        _outermost = None
        restore()
