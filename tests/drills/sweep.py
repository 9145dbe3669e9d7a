"""`python -m tests.drills inject`: one fault at each operation on files of a whole run, then the run again.

    python -m tests.drills inject [--ranks N] [--every K] [--points N] [--kinds kill,half,full]

A point is a system call that changes a file below the run's output_dir. Its end must be, byte for byte, what an
undisturbed run has, with no file too much.
"""

import argparse
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable

from tests.drills.injector import Operation, fault, library, operations, reason
from tests.drills.lab import Lab, contents, difference
from tests.drills.process import Done, Running
from tests.drills.run import CONFIG, RUN, TINY
from tests.drills.states import States

TRIES = 3  # of the same command, until it ends well
GRACE = 15  # seconds after the end of a rank before the others are killed, as launchers do
CREATES = {"open", "mkdir", "link", "write"}


def worlds(count: int) -> list[Callable[[], None]]:
    """For `before`, of each rank: what a launcher tells it; of one process nothing."""
    if count == 1:
        return [lambda: None]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        lambda rank=str(rank): os.environ.update(shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(count)
    ]


def run_ranks(lab: Lab, words: list[str], count: int, hurt: Callable[[], None] | None = None) -> Done:
    """The command on so many ranks, of which rank 0, which writes, is hurt. How the first one ended that failed."""

    def begin(rank: int, join: Callable[[], None]) -> Callable[[], None]:
        def before() -> None:
            join()
            if hurt and rank == 0:
                hurt()

        return before

    started = [Running(words, lab.folder, begin(rank, join)) for rank, join in enumerate(worlds(count))]
    first, *others = [process.wait(300) for process in _as_they_end(started)]
    return first if first.code else next((done for done in others if done.code), first)


def _as_they_end(started: list[Running]) -> list[Running]:
    """In the order in which they end; once one has failed the others have little time."""
    ended, deadline = [], time.monotonic() + 300
    while len(ended) < len(started) and time.monotonic() < deadline:
        for process in started:
            if process not in ended and process.failed() is not None:
                ended.append(process)
                if process.failed():
                    deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.002)
    for process in started:
        if process not in ended:
            os.kill(process.pid, signal.SIGKILL)
    return ended + [process for process in started if process not in ended]


def command(ranks: int) -> list[str]:
    return ["run", CONFIG, *TINY, *(["deepspeed=auto"] if ranks > 1 else [])]


def points(found: list[Operation], kinds: list[str]) -> list[tuple[Operation, str]]:
    """Half a write is of writes; a disk is full for what needs space, anything else is the next point's."""
    fits = {"half": {"write"}, "full": CREATES}
    return [
        (operation, kind) for operation in found for kind in kinds if operation.name in fits.get(kind, {operation.name})
    ]


def tried(lab: Lab, ranks: int, operation: Operation, kind: str, expected: dict[str, str]) -> str:
    """What is wrong after a fault and the same command again; empty: nothing."""
    done = run_ranks(lab, command(ranks), ranks, fault(kind, operation.number, lab.folder / RUN.parts[0]))
    if kind in ("full", "eio") and done.code and not done.is_clear:
        return f"unclear: {done.line}"
    for _ in range(TRIES):
        if done.code == 0:
            break
        done = run_ranks(lab, command(ranks), ranks)
    if done.code:
        return f"no way on: {done.line}"
    return difference(contents(lab.run), expected)


def sweep(options: argparse.Namespace) -> int:
    if library() is None:
        print(f"skipped: {reason}")
        return 0
    states, kinds = States(), options.kinds.split(",")
    try:
        undisturbed = states.lab("fresh")
        log = undisturbed.folder / "operations"
        folder = undisturbed.folder / RUN.parts[0]
        done = run_ranks(undisturbed, command(options.world), options.world, fault("count", 0, folder, log=log))
        assert done.code == 0, done.err
        expected, found = contents(undisturbed.run), operations(log)
        chosen = points(found, kinds)[:: options.every]
        if options.points:
            chosen = sorted(random.Random(options.seed).sample(chosen, min(options.points, len(chosen))), key=str)
        print(f"{len(found)} operations: {dict(Counter(operation.name for operation in found))}; {len(chosen)} points")
        begun, wrong = time.perf_counter(), 0
        for operation, kind in chosen:
            lab = states.lab("fresh")
            if said := tried(lab, options.world, operation, kind, expected):
                path = operation.path.partition(f"/{RUN}/")[2] or operation.path
                print(f"{kind} at {operation.number} ({operation.name} {path}): {said}", flush=True)
                wrong += 1
            lab.remove()
        seconds = time.perf_counter() - begun
        each = seconds / max(1, len(chosen))
        print(f"{len(chosen)} points, {len(chosen) - wrong} the same, {wrong} not; {each:.1f} s a point")
    finally:
        states.close()
    return 1 if wrong else 0
