"""A run is a folder: runs/NAME/{config.yaml, NN-stage/KEY/...}. A unit (one stage for one key) writes only its own
folder and ends with MANIFEST.json; a unit with a manifest that still fits its settings and inputs is not run again.

Nothing that is there is deleted or overwritten: what no longer fits is refused, and `--rerun` moves it to old-N.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from allo_fast import ranks
from allo_fast.config import Config, UserError
from allo_fast.config_file import load_config
from allo_fast.durable import LEFTOVERS, SCRATCH, Damaged, read_json, versions, write_json
from allo_fast.journal import SUMS
from allo_fast.model.loading import pick_device
from allo_fast.runs.basis import Basis, differences, flat, identity, is_same, sha256, under
from allo_fast.runs.home import CONFIG, MANIFEST, STARTED, Home
from allo_fast.training.checkpoints import CHECKPOINTS
from allo_fast.training.engine import LOG
from allo_fast.training.zero import Zero, trains_densely
from allo_kernels import memory

logger = logging.getLogger(__name__)


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
    outputs: tuple[str, ...]  # patterns of the files that it makes for others
    settings: tuple[str, ...]  # the config keys, or sections, that its outcome depends on
    needs: Callable[[Config, str], list[tuple[str, str]]]  # (stage, key) of the units it reads
    keys: Callable[[Config], list[str]]  # one unit for each: usually the seeds
    files: Callable[[Config], dict[str, list[Path]]] = lambda config: {}  # those outside the run that a key names
    seed: Callable[[Config], int] = lambda config: 0  # of a unit whose key names none
    copies: tuple[str, ...] = ()  # of what it makes beside them, which nothing reads again and which may be removed


@dataclass
class Unit:
    owner: "Run"
    name: str
    key: str
    mark: str = ""  # of what its unfinished files are, while it is executed

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
    def place(self) -> Path:
        """In the run's folder."""
        return Path(f"{self.stage.number:02d}-{self.name}", self.key)

    @property
    def folder(self) -> Path:
        return self.owner.folder / self.place

    @property
    def seed(self) -> int:
        return int(self.key.rpartition("seed-")[2]) if "seed-" in self.key else self.stage.seed(self.config)

    def upstream(self) -> list["Unit"]:
        return [Unit(self.owner, name, key) for name, key in self.stage.needs(self.config, self.key)]

    def needed(self, stage: str) -> Path:
        """The folder of a unit that this one reads."""
        (unit,) = [unit for unit in self.upstream() if unit.name == stage]
        return unit.folder

    def basis(self) -> Basis:
        """Settings, and SHA-256 of the files that they name and of what this unit reads of others. Not where files lie.

        Raises UserError when an upstream unit is not complete, or no longer fits its own settings and inputs.
        """
        for unit in self.upstream():
            unit.check()
        files = self.stage.files(self.config)
        settings = under(flat(self.config.model_dump()), self.stage.settings)
        settings |= {key: PurePath(settings[key]).name for key in files}
        contents = {f"{key}: {path.name}": sha256(path) for key, paths in files.items() for path in paths}
        for unit in self.upstream():
            contents |= {str(unit.place / name): digest for name, digest in unit.contents().items()}
        return settings | contents | {"seed": self.seed}

    def contents(self) -> dict[str, str]:
        """SHA-256 of each output."""
        return {name: entry["sha256"] for name, entry in self.manifest()["outputs"].items()}

    def manifest(self) -> dict:
        """Raises UserError when the unit is not complete, or its manifest damaged."""
        if not (path := self.folder / MANIFEST).is_file():
            raise UserError(f"{self.folder}: not complete; run `allo-fast {self.name} CONFIG` first")
        return read_json(path)

    def look(self) -> tuple[bool, str | None]:
        """Is the unit complete; and why what lies there can neither be taken nor continued, None where it can."""
        started, manifest = self.folder / STARTED, self.folder / MANIFEST
        try:
            record = read_json(manifest if manifest.exists() else started) if self._exists() else None
        except Damaged as error:
            return False, str(error).removeprefix(f"{self.folder}/")
        if record is None:
            return False, None
        if changed := differences(record["basis"], self.basis()):
            return False, changed
        if manifest.exists() and (damage := self.damage()):
            return False, damage
        return manifest.exists(), None

    def is_complete(self) -> bool:
        """A manifest that fits today's settings and inputs, and outputs that are what it says; rank 0 looks."""
        return ranks.on_main(self.look)[0]

    def damage(self) -> str | None:
        """What is wrong with the files of a unit that has a manifest."""
        manifest = self.manifest()
        copies = {name: entry for name, entry in manifest["copies"].items() if (self.folder / name).exists()}
        for name, entry in (manifest["outputs"] | copies).items():
            if not is_same(self.folder / name, entry):
                return f"{name} is {'not what was written' if (self.folder / name).exists() else 'gone'}"
        return None

    def check(self) -> None:
        """Raises UserError unless the unit is complete."""
        complete, objection = self.look()
        if not complete:
            raise UserError(f"{self.folder}: {objection or 'not complete'}; run `allo-fast {self.name} CONFIG` first")

    def execute(self) -> Iterator[Progress]:
        """Runs or continues the stage; the manifest comes last, so that nothing half-written looks complete.

        What is refused before it has made anything leaves no trace. Raises UserError where something lies there that
        does not fit, unless the run is one that moves it aside.
        """
        new, self.mark = ranks.on_main(self._start)
        first = True
        device = pick_device(self.config.model.device)
        memory.reset_peak(device)
        begun, work = time.perf_counter(), self.stage.execute(self)
        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                facts = end.value
                break
            except UserError:
                if new and ranks.is_main():
                    self.owner.home.undo(self.place)
                raise
            if first and ranks.is_main():  # alone: another rank may be elsewhere when it has its first progress
                self.owner.home.take_config(self.config, self.owner.rerun)
            new = first = False
            yield progress
        seconds = time.perf_counter() - begun  # of this session: a continued stage took longer in all
        ranks.on_main(lambda: self._finish(facts, seconds, memory.peak_bytes(device)))

    def _exists(self) -> bool:
        return self.folder.exists() and any(not path.match(LEFTOVERS) for path in self.folder.iterdir())

    def _start(self) -> tuple[bool, str]:
        """Whether nothing had been there, and the mark."""
        _, objection = self.look()
        if objection and not self.owner.rerun:
            raise UserError(
                f"{self.folder}: {objection}. It stays as it is; --rerun moves it to {self.owner.home.aside.name} and "
                "makes it anew"
            )
        if objection:
            self.owner.home.set_aside(self.place)
        if new := not self._exists():
            write_json(self.folder / STARTED, {"basis": self.basis(), "versions": versions()})
        started = read_json(self.folder / STARTED)
        if changed := differences(started["versions"], versions()):
            logger.warning("%s: continued with other software: %s", self.folder, changed)
        return new, hashlib.sha256(json.dumps(started["basis"], sort_keys=True).encode()).hexdigest()

    def _finish(self, facts: dict, seconds: float, peak: int) -> None:
        manifest = {
            "stage": self.name,
            "key": self.key,
            "basis": read_json(self.folder / STARTED)["basis"],
            "seed": self.seed,
            "seconds": seconds,
            "peak_bytes": peak,
            "facts": facts,
            "outputs": self._identities(*self.stage.outputs),
            "copies": self._identities(*self.stage.copies),
            "logs": self._identities(LOG),
            "versions": versions(),
        }
        write_json(self.folder / MANIFEST, manifest)
        self.tidy()

    def _identities(self, *patterns: str) -> dict[str, dict]:
        paths = sorted(path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file())
        return {str(path.relative_to(self.folder)): identity(path) for path in paths}

    def tidy(self) -> None:
        """The run is one with these settings; what a complete unit needs no more is removed, which a kill may leave."""
        self.owner.home.take_config(self.config, self.owner.rerun)
        for pattern in (STARTED, CHECKPOINTS, f"*{SUMS}"):
            for path in self.folder.glob(pattern):
                path.unlink()
        for path in [self.folder / SCRATCH, *self.folder.rglob(LEFTOVERS)]:
            shutil.rmtree(path, ignore_errors=True)


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
        self.config, self.stages, self.rerun = config, stages, rerun
        self.zeros = zeros or {"dense": None, "sparse": None}
        self.home = Home(folder or Path(config.output_dir) / config.name)
        if folder is None:
            ranks.on_main(self._claim)

    @property
    def folder(self) -> Path:
        return self.home.folder

    @classmethod
    def read(cls, folder: Path, stages: dict[str, Stage]) -> "Run":
        """The run in `folder`, wherever that was moved, with the settings it ran with; nothing is written there.

        Raises UserError where there is none.
        """
        if not (path := folder / CONFIG).is_file():
            raise UserError(f"{folder}: not the folder of a run (it has no {CONFIG})")
        return cls(load_config(path), stages, folder=folder)

    def _claim(self) -> None:
        if not self.home.is_begun:
            self.home.check_free()
        elif not self.rerun and (changed := self.home.changed_settings(self.config)):
            raise UserError(
                f"{self.folder} holds another run: {changed}. Give this one a name of its own (name=...), or add "
                "--rerun to run again what the change affects"
            )

    def units(self, names: Iterable[str]) -> list[Unit]:
        return [Unit(self, name, key) for name in names for key in self.stages[name].keys(self.config)]
