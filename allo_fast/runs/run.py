"""A run is a folder: runs/NAME/{config.yaml, NN-stage/KEY/...}. A unit (one stage for one key) writes only its own
folder and ends with MANIFEST.json; a unit with a manifest that still fits its settings and inputs is not run again.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

from allo_fast import ranks
from allo_fast.config import Config, UserError
from allo_fast.config_file import load_config, save_config
from allo_fast.model.loading import pick_device
from allo_fast.training.engine import CHECKPOINT
from allo_fast.training.zero import Zero, trains_densely
from allo_kernels import memory

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
STARTED = "STARTED.json"
SCRATCH = "scratch"  # a folder of what a unit needs until it is complete
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    noun: str  # what is counted: step, problem, ...
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """execute(unit) yields Progress and returns the facts that its manifest records."""

    number: int
    execute: Callable[["Unit"], Generator[Progress, None, dict]]
    settings: tuple[str, ...]  # the config keys, or sections, that its outcome depends on
    needs: Callable[[Config, str], list[tuple[str, str]]]  # (stage, key) of the units it reads
    keys: Callable[[Config], list[str]]  # one unit for each: usually the seeds
    files: Callable[[Config], list[Path]] = lambda config: []  # existing files outside the run that it reads
    seed: Callable[[Config], int] = lambda config: 0  # of a unit whose key names none


@dataclass
class Unit:
    owner: "Run"
    name: str
    key: str

    @property
    def config(self) -> Config:
        return self.owner.config

    @property
    def zero(self) -> Zero | None:
        """How DeepSpeed trains this stage; None: one process without it."""
        return self.owner.zeros["dense" if trains_densely(self.config, self.name) else "sparse"]

    @property
    def stage(self) -> Stage:
        return self.owner.stages[self.name]

    @property
    def folder(self) -> Path:
        return self.owner.folder / f"{self.stage.number:02d}-{self.name}" / self.key

    @property
    def seed(self) -> int:
        return int(self.key.rpartition("seed-")[2]) if "seed-" in self.key else self.stage.seed(self.config)

    def upstream(self) -> list["Unit"]:
        return [Unit(self.owner, name, key) for name, key in self.stage.needs(self.config, self.key)]

    def needed(self, stage: str) -> Path:
        """The folder of a unit that this one reads."""
        (unit,) = [unit for unit in self.upstream() if unit.name == stage]
        return unit.folder

    def digest(self) -> str:
        """Changes when a setting, an input file or an upstream output changes.

        Raises UserError when an upstream unit is not complete, or no longer fits its own settings and inputs.
        """
        for unit in self.upstream():
            if not unit.is_complete_here():
                raise UserError(f"{unit.folder}: not complete or out of date; run `allo-fast {unit.name} CONFIG` first")
        settings = {
            key: value
            for key, value in _flat(self.config.model_dump()).items()
            if any(key == prefix or key.startswith(prefix + ".") for prefix in self.stage.settings)
        }
        upstream = {f"{unit.name}/{unit.key}": unit.contents() for unit in self.upstream()}
        files = {str(path): sha256(path) for path in self.stage.files(self.config)}
        content = json.dumps([settings, upstream, files, self.seed], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def contents(self) -> dict[str, str]:
        """SHA-256 of the outputs that another unit may read; the log of wall times is not one."""
        outputs = self.manifest()["outputs"].items()
        return {name: entry["sha256"] for name, entry in outputs if name != "metrics.jsonl"}

    def manifest(self) -> dict:
        """Raises UserError when the unit is not complete."""
        path = self.folder / MANIFEST
        if not path.is_file():
            raise UserError(f"{self.folder}: not complete; run `allo-fast {self.name} CONFIG` first")
        return json.loads(path.read_text())

    def is_complete(self) -> bool:
        """A manifest that fits today's settings and inputs, and outputs that are what it says; rank 0 looks."""
        return ranks.on_main(self.is_complete_here)

    def is_complete_here(self) -> bool:
        """`is_complete`, without asking the other ranks."""
        return (self.folder / MANIFEST).is_file() and self.manifest()["digest"] == self.digest() and self.is_intact()

    def is_intact(self) -> bool:
        """A manifest, whatever it fits, and outputs that are what it says."""
        if not (self.folder / MANIFEST).is_file():
            return False
        return all(_fits(self.folder / name, entry) for name, entry in self.manifest()["outputs"].items())

    def execute(self) -> Iterator[Progress]:
        """Runs or continues the stage; the manifest comes last, so that nothing half-written looks complete."""
        digest = ranks.on_main(self._start)
        device = pick_device(self.config.model.device)
        memory.reset_peak(device)
        begun = time.perf_counter()
        facts = yield from self.stage.execute(self)
        seconds = time.perf_counter() - begun  # of this session: a continued stage took longer in all
        peak = memory.peak_bytes(device)
        ranks.on_main(lambda: self._finish(digest, facts, seconds, peak))

    def _start(self) -> str:
        digest, started = self.digest(), self.folder / STARTED
        if not (started.is_file() and json.loads(started.read_text()) == digest):
            shutil.rmtree(self.folder, ignore_errors=True)  # left by other settings: not to be continued
            self.folder.mkdir(parents=True)
            write_atomically(started, json.dumps(digest))
        return digest

    def _finish(self, digest: str, facts: dict, seconds: float, peak: int) -> None:
        passing = {self.folder / name for name in (STARTED, CHECKPOINT)}
        passing |= {*(self.folder / SCRATCH).rglob("*"), *self.folder.rglob("*.partial")}
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path not in passing)
        manifest = {
            "stage": self.name,
            "key": self.key,
            "digest": digest,
            "seed": self.seed,
            "seconds": seconds,
            "peak_bytes": peak,
            "facts": facts,
            "inputs": {f"{unit.name}/{unit.key}": unit.contents() for unit in self.upstream()},
            "outputs": {str(path.relative_to(self.folder)): _identity(path) for path in files},
            "versions": versions(),
        }
        write_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        self.tidy()

    def tidy(self) -> None:
        """Removes what a complete unit needs no more, and may have where it was killed just before."""
        (self.folder / STARTED).unlink(missing_ok=True)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)


class Run:
    """Raises UserError when the folder holds something else: another run, or files that are not a run's.

    rerun: accept changed settings and run again what they affect. zeros: how DeepSpeed trains "dense" and "sparse"
    stages; None: one process. folder: where a run lies that is to be read, nothing claimed; None: output_dir/name.
    """

    def __init__(
        self,
        config: Config,
        stages: dict[str, Stage],
        rerun: bool = False,
        zeros: dict[str, Zero] | None = None,
        folder: Path | None = None,
    ):
        self.config, self.stages = config, stages
        self.zeros = zeros or {"dense": None, "sparse": None}
        self.folder = folder or Path(config.output_dir) / config.name
        if folder is None:
            ranks.on_main(lambda: self._claim(rerun))

    @classmethod
    def read(cls, folder: Path, stages: dict[str, Stage]) -> "Run":
        """The run in `folder`, wherever that was moved, with the settings it ran with; nothing is written there.

        Raises UserError where there is none.
        """
        if not (path := folder / CONFIG).is_file():
            raise UserError(f"{folder}: not the folder of a run (it has no {CONFIG})")
        return cls(load_config(path), stages, folder=folder)

    def _claim(self, rerun: bool) -> None:
        config = self.config
        path = self.folder / CONFIG
        if path.is_file():
            if (changed := _differences(load_config(path), config)) and not rerun:
                raise UserError(
                    f"{self.folder} holds another run: {changed}. Give this one a name of its own (name=...), or add "
                    "--rerun to run again what the change affects"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder}: not empty, and not the folder of a run (it has no {CONFIG})")
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, path)

    def units(self, names: Iterable[str]) -> list[Unit]:
        return [Unit(self, name, key) for name in names for key in self.stages[name].keys(self.config)]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other command works in a run's folder; the end of rank 0's process lets go too.

    Raises UserError where one does already.
    """
    with ExitStack() as stack:
        ranks.on_main(lambda: _lock(folder, stack))
        yield


def _lock(folder: Path, stack: ExitStack) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(folder.with_name(f".{folder.name}.lock").open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder}: {file.read() or 'another command'} works there; end it first") from None
    except OSError as error:
        logger.warning("%s: cannot be locked (%s): see to it that one command works there", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} of {platform.node()}")
    file.flush()


def versions() -> dict[str, str]:
    packages = "torch", "transformers", "safetensors", "numpy"
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.rename(partial, path)


def sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(path: Path) -> dict:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _fits(path: Path, entry: dict) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]


# Where a run is continued and how much of it is kept, not what it is.
_ELSEWHERE = {"deepspeed": True, "ddp_timeout": True, "save_models": True, "model": {"device"}}


def _differences(old: Config, new: Config) -> str:
    before, after = (_flat(config.model_dump(exclude=_ELSEWHERE)) for config in (old, new))
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    return ", ".join(f"{key} was {before.get(key)}, now {after.get(key)}" for key in keys)


def _flat(section: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
