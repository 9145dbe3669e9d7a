"""injector.c, compiled when it is needed: faults at the n-th system call that changes a file below a folder."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# nothing; SIGKILL before the call; half of it, then SIGKILL; no space from there on; an error of the disk, once; and
# not permitted, for every call that opens or makes what matches.
KINDS = ("count", "kill", "half", "full", "eio", "deny")


@dataclass(frozen=True)
class Operation:
    number: int  # from 1
    name: str  # open, write, rename, ...
    path: str
    target: str  # the new name, where it renames


@cache
def library() -> Path | None:
    """Compiled, once for each text of it; None: why it cannot be is what `reason` says."""
    compiler = shutil.which("cc")
    if compiler is None or os.uname().machine not in ("x86_64", "aarch64") or os.uname().sysname != "Linux":
        return None
    source = Path(__file__).with_suffix(".c")
    name = f"allo-fast-injector-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    compiled = Path(tempfile.gettempdir()) / name
    if not compiled.exists():
        partial = compiled.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", partial, source], check=True)
        partial.rename(compiled)
    return compiled


reason = "the injector needs cc, Linux, and x86-64 or ARM"


def fault(kind: str, at: int, folder: Path, match: str = "", log: Path | None = None) -> Callable[[], None]:
    """For `before`: the fault strikes at the `at`-th operation on a path below `folder` that has `match` in it."""

    def arm() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else -1
        below = os.fsencode(folder.resolve())
        if ctypes.CDLL(str(library())).arm(below, match.encode(), ctypes.c_long(at), KINDS.index(kind), descriptor):
            raise OSError("the injector cannot be armed: seccomp is not permitted here")

    return arm


def operations(log: Path) -> list[Operation]:
    rows = (line.split("\t") for line in log.read_text().splitlines())
    return [Operation(int(number), *rest) for number, *rest in rows]
