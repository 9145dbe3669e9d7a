"""What commands show while they work: lines, and progress as a bar; of several processes rank 0 alone."""

import logging
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from allo_fast import ranks, signals
from allo_fast.durable import make_folder
from allo_fast.runs.unit import Progress

_said = logging.getLogger("allo_fast.said")
_said.propagate = False


def say(line: str) -> None:
    if ranks.is_main():
        print(line, flush=True)
        _said.info(line)


@contextmanager
def logged(path: Path, command: str) -> Iterator[None]:
    """Inside, what is said and what is warned of goes to the end of this file, too, with the time; and what ends it."""
    if not ranks.is_main():
        yield
        return
    make_folder(path.parent)
    handler = _File(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = _said, logging.getLogger("allo_fast")
    for each in loggers:
        each.addHandler(handler)
    try:
        _said.info(command)
        yield
        _said.info("done")
    except BaseException as error:
        _said.info(f"ended: {error or type(error).__name__}")
        raise
    finally:
        for each in loggers:
            each.removeHandler(handler)
        with suppress(OSError):  # of a full disk, as below
            handler.close()


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk ends what needs room, and says so; not what is told of it."""


def show(label: str, work: Generator[Progress, None, object]) -> object:
    """Runs a generator of progress behind a bar; returns what it returns."""
    file = sys.stderr if ranks.is_main() else StringIO()
    with logging_redirect_tqdm(), tqdm(desc=label, mininterval=0.5, file=file) as bar:  # what is said has its own lines
        noun = None  # a bar that TQDM_DISABLE switches off has no unit
        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                return end.value
            signals.check()
            if noun != progress.noun:
                bar.unit = noun = progress.noun
                bar.reset(progress.total)
            bar.set_postfix({key: f"{value:.3g}" for key, value in progress.notes.items()}, refresh=False)
            bar.update(progress.done - bar.n)
