"""The ranks of a test without their start-up: a process that has imported everything forks every rank of every case.

That process has computed nothing and joined nothing, so that each fork is as good as a new process.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
SOURCES = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests"))
ENVIRONMENT = {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Done:
    """A case on all its ranks: the first exit code that was not 0, and what they said, rank after rank."""

    returncode: int
    stdout: str
    stderr: str


class RankServer:
    """The test's end of a process that serves: `script` without arguments calls `serve`."""

    def __init__(self, script: Path):
        ours, its = socket.socketpair()
        with its:
            command = [sys.executable, str(script)]
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdin=its, start_new_session=True
            )
        self._channel = ours.makefile("rw")
        ours.close()  # when the channel is

    def run(self, world: int, folder: Path, *words: object, timeout: int = 200, **environment: str) -> Done:
        """A case on `world` ranks, or, if 0, in one process without a launcher; `folder` takes what they say.

        timeout: in seconds; no rank lives longer, nor longer than this process.
        """
        folder.mkdir(parents=True, exist_ok=True)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [{**held, **environment} for held in _environments(world, store.port)]
        files = [str(folder / f"rank-{rank}") for rank in range(len(ranks))]
        job = {"words": [*map(str, words)], "timeout": timeout, "files": files, "environments": ranks}
        print(json.dumps(job), file=self._channel, flush=True)
        code = int(self._channel.readline())
        return Done(code, *("".join(Path(file + kind).read_text() for file in files) for kind in (".out", ".err")))

    def close(self) -> None:
        """Ends it, and any rank that still runs."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._channel.close()


def _environments(world: int, port: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank; the ranks meet at a store of ours."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)] or [{}]


def serve(work: Callable[..., int]) -> None:
    """For every line, forks the ranks of a case, each to exit with what `work(*words)` returns, and answers with
    the first code that is not 0."""
    channel = socket.socket(fileno=0).makefile("rw")
    _end_with_parent()
    gc.collect()
    gc.freeze()  # what is imported stays: no rank looks for garbage there
    for line in channel:
        job = json.loads(line)
        places = zip(job["files"], job["environments"], strict=True)
        pids = {os.fork() or _be_rank(work, job["words"], job["timeout"], *place) for place in places}
        print(_wait(pids), file=channel, flush=True)


def _be_rank(work: Callable[..., int], words: list[str], timeout: int, file: str, environment: dict) -> None:
    """Never returns."""
    _end_with_parent()
    signal.alarm(timeout)
    os.environ.update(environment)
    for number, kind in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(file + kind, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        code = work(*words)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an interpreter with frozen objects cannot be taken down in order


def _end_with_parent() -> None:
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    prctl(set_death_signal, signal.SIGKILL)


def _wait(running: set[int]) -> int:
    """The first exit code that is not 0, upon which the other ranks are ended, as a launcher does."""
    first = 0
    while running:
        pid, status = os.waitpid(-1, 0)
        running.remove(pid)
        if status and not first:
            first = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGKILL)
    return first
