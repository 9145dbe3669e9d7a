"""SIGTERM, SIGHUP and SIGINT end a command with a line; training finishes its step and saves a checkpoint before."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_deferrals = 0
_received = 0
_raised = False  # since then whatever a library raises may be what it made of Interrupted


class Interrupted(KeyboardInterrupt):
    """number: of the signal."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}; the same command continues")
        self.number = number


@contextmanager
def handled() -> Iterator[None]:
    """Inside, the first signal raises Interrupted, or waits while something defers it; a second one ends at once.

    Below a launcher, which ends its processes itself when they take too long, further ones are those that it passes on
    of the first. What is ignored from the start, as SIGHUP below nohup, stays so. Whatever a library makes of
    Interrupted, outside it is that again; where nothing can be raised, as in what the garbage collector calls, the next
    `check` does.
    """
    global _received, _raised
    before, unraisable = {number: signal.getsignal(number) for number in _NUMBERS}, sys.unraisablehook
    sys.unraisablehook = lambda args: None if isinstance(args.exc_value, Interrupted) else unraisable(args)
    for number in _heard():
        signal.signal(number, _receive)
    try:
        yield
    except Exception as error:
        check_cause(error)
        raise
    finally:
        _received, _raised, sys.unraisablehook = 0, False, unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises Interrupted where a signal came that nothing defers."""
    global _raised
    if _received and not _deferrals:
        _raised = True
        raise Interrupted(_received)


def check_cause(error: Exception) -> None:
    """Raises Interrupted where a signal led to `error`: it ended a library's work, or the terminal is gone with it."""
    if _raised or (_received and isinstance(error, OSError) and error.errno in (errno.EIO, errno.EPIPE)):
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


def say(line: str) -> None:
    """Once of all ranks, and also where nobody listens any more; print may be what a signal interrupted."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\n{line}\n".encode())  # a bar may have been cut in its line


def _receive(number: int, frame: object) -> None:
    global _received
    _received = number
    is_launched = "LOCAL_RANK" in os.environ
    for each in _heard():
        signal.signal(each, signal.SIG_IGN if is_launched else signal.SIG_DFL)
    check()
    again = "" if is_launched else "; a second signal ends it at once"
    say(f"{signal.Signals(number).name}: ends after this step and its checkpoint{again}")


def _heard() -> list[int]:
    return [number for number in _NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
