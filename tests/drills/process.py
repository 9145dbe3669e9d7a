"""Commands of allo-fast, each in a process of its own that is forked from this one: no drill pays for imports.

This one has OMP_NUM_THREADS=1 and never calls torch.set_num_threads: that makes a pool of threads, which in a child two
threads may replace at once.
"""

import gc
import importlib
import os
import re
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from allo_fast.__main__ import main

MEMORY = 6 << 30  # bytes that a command may allocate
_BAR = re.compile(r"\d+%\||\d+it \[")
_NOISE = 5  # lines of others around ours that still leave it to be seen


@dataclass(frozen=True)
class Done:
    """How a command ended. code: minus the signal that ended it; None: it was ended after its time."""

    code: int | None
    out: str
    err: str
    peak_bytes: int = 0

    @property
    def lines(self) -> list[str]:
        """What was said, progress bars left out."""
        pieces = re.split(r"[\r\n]+", f"{self.out}\n{self.err}")
        return [piece.strip() for piece in pieces if piece.strip() and not _BAR.search(piece)]

    @property
    def complaints(self) -> list[str]:
        """The lines that begin with the program's name; problems listed below one belong to it."""
        text = "\n".join(self.lines)
        return [found.replace("\n", " ") for found in re.findall(r"^allo-fast: .*(?:\n\d+\. .*)*", text, re.MULTILINE)]

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.err or "Fatal Python error" in self.err

    @property
    def is_clear(self) -> bool:
        """It ended as it should where it cannot go on: exit code 2 or a signal's, and one line that says why."""
        ended = self.code in (2, *(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)))
        others = [line for line in self.err.splitlines() if line.strip() and not _BAR.search(line)]
        listed = sum(bool(re.match(r"allo-fast: |\d+\. ", line)) for line in others)
        return ended and len(self.complaints) == 1 and not self.has_traceback and len(others) - listed <= _NOISE

    @property
    def line(self) -> str:
        """The one that tells most."""
        if self.code is None:
            return "no end"
        if self.has_traceback:
            return f"traceback: {self.err.strip().splitlines()[-1]}"
        if self.code == 0:
            return "exit 0"
        return self.complaints[0] if self.complaints else ": ".join([f"exit {self.code}", *self.lines[-1:]])


class Running:
    """main(words) in a new process whose working directory is `folder`; `before` is called there first."""

    def __init__(self, words: list[str], folder: Path, before: Callable[[], object] | None = None, stdin: str = ""):
        self._files = [os.memfd_create(kind) for kind in ("in", "out", "err")]  # where no fault strikes
        os.pwrite(self._files[0], stdin.encode(), 0)
        self.pid = os.fork() or _be(words, folder, before, self._files)

    def failed(self) -> bool | None:
        """None while it runs."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return None if ended is None else ended.si_code != os.CLD_EXITED or ended.si_status != 0

    def wait(self, timeout: float = 300) -> Done:
        """Ended by force after `timeout` seconds."""
        watched = os.pidfd_open(self.pid)
        ended = select.select([watched], [], [], timeout)[0]
        os.close(watched)
        if not ended:
            os.killpg(self.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        out, err = (os.pread(file, 1 << 24, 0).decode(errors="replace") for file in self._files[1:])
        for file in self._files:
            os.close(file)
        return Done(code if ended else None, out, err, usage.ru_maxrss << 10)


def run(words: list[str], folder: Path, before=None, timeout: float = 300, stdin: str = "") -> Done:
    return Running(words, folder, before, stdin).wait(timeout)


def _be(words: list[str], folder: Path, before: Callable[[], object] | None, files: list[int]) -> None:
    """Never returns. Ends as `sys.exit(main())` would."""
    os.setpgid(0, 0)
    for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # which a shell may have had ignored
        signal.signal(each, signal.SIG_DFL)
    code = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.chdir(folder)
        if before:
            before()
        code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int | None) else 1
    except BaseException as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        with suppress(OSError):  # of a drill after which nobody listens
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


def warm_up(words: list[str], folder: Path) -> Done:
    """Runs a command, and imports here what it imported there, so that what is forked from now on does not."""
    listed = folder / "modules"

    def list_modules_at_end() -> None:
        leave = os._exit

        def list_and_leave(code: int) -> None:
            listed.write_text("\n".join(sys.modules))
            leave(code)

        os._exit = list_and_leave

    done = run(words, folder, list_modules_at_end, timeout=300)
    for name in listed.read_text().splitlines():
        try:
            importlib.import_module(name)
        except ImportError:  # made by hand: modules that no file is behind
            pass
    listed.unlink()
    gc.collect()
    gc.freeze()  # what is imported stays: no command looks for garbage there
    return done
