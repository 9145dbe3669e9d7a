"""What commands show while they work: lines, and progress as a bar; of several processes rank 0 alone."""

import sys
from collections.abc import Generator
from io import StringIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from allo_fast import ranks, signals
from allo_fast.runs.unit import Progress


def say(line: str) -> None:
    if ranks.is_main():
        print(line, flush=True)


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
