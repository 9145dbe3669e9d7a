"""SIGTERM, SIGHUP and SIGINT end a command with a line; training finishes its step and saves a checkpoint before."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_deferrals = 0
_received = 0


class Interrupted(KeyboardInterrupt):
    """number: of the signal."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}; the same command continues")
        self.number = number


@contextmanager
def handled() -> Iterator[None]:
    """Inside, the first signal raises Interrupted, or waits while something defers it; a second one ends at once.

    Whatever a library makes of Interrupted, outside it is that again.
    """
    global _received
    before = {number: signal.signal(number, _receive) for number in _NUMBERS}
    try:
        yield
    except Exception:
        check()
        raise
    finally:
        _received = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises Interrupted where a signal came that nothing defers."""
    if _received and not _deferrals:
        raise Interrupted(_received)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Inside, a signal only makes what this gives return its number; without one, 0."""
    global _deferrals
    _deferrals += 1
    try:
        yield lambda: _received
    finally:
        _deferrals -= 1


def _receive(number: int, frame: object) -> None:
    global _received
    _received = number
    for each in _NUMBERS:
        signal.signal(each, signal.SIG_DFL)
    check()
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        line = f"\n{name}: ends after this step and its checkpoint; a second signal ends it at once\n"
        os.write(2, line.encode())  # print may be what the signal interrupted
