"""One command at a time in a run's folder."""

import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.durable import make_folder

logger = logging.getLogger(__name__)


class Busy(UserError):
    """Another command works there."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other command works in a run's folder; the end of rank 0's process lets go too.

    Raises Busy where one does already.
    """
    with ExitStack() as stack:
        ranks.on_main(lambda: _lock(folder.resolve(), stack))
        yield


def _lock(folder: Path, stack: ExitStack) -> None:
    make_folder(folder.parent)
    file = stack.enter_context(folder.with_name(f".{folder.name}.lock").open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise Busy(f"{folder}: {file.read() or 'another command'} works there; end it first") from None
    except OSError as error:
        logger.warning("%s: cannot be locked (%s): see to it that one command works there", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} of {platform.node()}")
    file.flush()
