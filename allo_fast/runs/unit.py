"""A run is a folder: runs/NAME/{config.yaml, NN-stage/KEY/...}. A unit (one stage for one key) writes only its own
folder and ends with MANIFEST.json; a unit with a manifest that still fits its settings and inputs is not run again.

Nothing that is there is deleted or overwritten: what no longer fits is refused, and `--rerun` moves it to old-N.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from allo_fast import ranks
from allo_fast.config import Config, UserError
from allo_fast.device import pick_device
from allo_fast.durable import LEFTOVERS, SCRATCH, Damaged, read_json, versions, write_json
from allo_fast.journal import SUMS
from allo_fast.model.loading import model_files
from allo_fast.runs.basis import (
    Basis,
    deciding,
    differences,
    flat,
    inside,
    naming_files,
    part_of,
    under,
)
from allo_fast.runs.contents import damage, identities, sha256
from allo_fast.runs.home import MANIFEST, STARTED, Home, recorded
from allo_fast.training.checkpoints import BESTS, CHECKPOINTS
from allo_fast.training.metrics import LOG
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
    files: Callable[[Config], dict[str, dict[str, Path]]] = lambda config: {}  # outside the run, by the key of each
    seed: Callable[[Config], int] = lambda config: 0  # of a unit whose key names none
    copies: tuple[str, ...] = ()  # of what it makes beside them, which nothing reads again and which may be removed


class Owner(Protocol):
    """The run of a unit."""

    config: Config
    stages: dict[str, Stage]
    rerun: bool
    zeros: dict[str, Zero | None]
    home: Home


@dataclass
class Unit:
    owner: Owner
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
        return self.owner.home.folder / self.place

    @property
    def seed(self) -> int:
        return int(self.key.rpartition("seed-")[2]) if "seed-" in self.key else self.stage.seed(self.config)

    def upstream(self) -> list["Unit"]:
        return [Unit(self.owner, name, key) for name, key in self.stage.needs(self.config, self.key)]

    def needed(self, stage: str) -> Path:
        """The folder of a unit that this one reads."""
        (unit,) = [unit for unit in self.upstream() if unit.name == stage]
        return unit.folder

    def settings(self) -> Basis:
        """Of the configuration, what its outcome depends on."""
        return deciding(under(flat(self.config.model_dump()), self.stage.settings))

    def basis(self, outside: bool = True) -> Basis:
        """Settings, and SHA-256 of the files that they name and of what this unit reads of others.

        Of files neither where they lie nor, of a single one, how it is called. outside: those that lie not in the run,
        too. Raises UserError when an upstream unit is not complete, or no longer fits its own settings and inputs.
        """
        contents = {}
        for unit in self.upstream():
            unit.check(outside)
            contents |= {str(unit.place / name): digest for name, digest in unit.contents().items()}
        return self.settings() | contents | (self.outside() if outside else {}) | {"seed": self.seed}

    def outside(self) -> Basis:
        """Of what lies not in the run, and its settings name, which part, and SHA-256 of each file."""
        contents = {}
        for key, files in self.stage.files(self.config).items():
            contents[key] = part_of(under(flat(self.config.model_dump()), (key,))[key])
            contents |= {f"{key}: {name}": sha256(path) for name, path in files.items()}
        return contents

    def changed_settings(self) -> str:
        """Since it was begun; empty where nothing did, or nothing says. Files are left out."""
        try:
            before = inside(old := recorded(self.folder), naming_files(old)) if self._exists() else {}
        except Damaged:
            before = {}
        now = inside(self.settings() | {"seed": self.seed}, naming_files(old) if before else set())
        return differences({key: before[key] for key in before if "/" not in key}, now) if before else ""

    def contents(self) -> dict[str, str]:
        """SHA-256 of each output."""
        return {name: entry["sha256"] for name, entry in self.manifest()["outputs"].items()}

    def manifest(self) -> dict:
        """Raises UserError when the unit is not complete, or its manifest damaged."""
        if not (path := self.folder / MANIFEST).is_file():
            raise UserError(f"{self.folder}: not complete; run `allo-fast {self.name} CONFIG` first")
        return read_json(path)

    def look(self, outside: bool = True) -> tuple[bool, str | None]:
        """Is the unit complete; and why what lies there can neither be taken nor continued, None where it can.

        outside: files that it was made from, too, of those that lie not in the run. Raises UserError where they are not
        there, or where something only has to be moved away.
        """
        if not self._exists():
            return False, None
        try:
            old = recorded(self.folder)
        except Damaged as error:
            return False, str(error).removeprefix(f"{self.folder}/")
        new, naming = self.basis(outside), naming_files(old)
        if outside and (gone := sorted(key for key in naming - naming_files(new) if new.get(key) is not None)):
            raise UserError(
                f"{self.folder}: {', '.join(f'{key}: {new.get(key)} is not there' for key in gone)}; bring it back, or "
                "name where it lies"
            )
        if changed := differences(old, new) if outside else differences(inside(old, naming), inside(new, naming)):
            return False, changed
        damage = self.damage(copies=outside) if (complete := (self.folder / MANIFEST).exists()) else None
        return complete and not damage, damage

    def changed_base(self) -> str:
        """What changed of the given base since, beside its weights, which a delta knows; empty where nothing did."""
        key, path = "model.name_or_path", self.config.model.name_or_path
        now = {f"{key}: {name}": file for name, file in model_files(path).items()} if path else {}
        before = {name: digest for name, digest in recorded(self.folder).items() if name.startswith(f"{key}: ")}
        beside = [name for name in before | now if not name.endswith(".safetensors")]
        old = {name: before[name] for name in beside if name in before}
        return differences(old, {name: sha256(now[name]) for name in beside if name in now})

    def is_complete(self) -> bool:
        """A manifest that fits today's settings and inputs, and outputs that are what it says; rank 0 looks."""
        return ranks.on_main(self.look)[0]

    @property
    def is_ahead(self) -> bool:
        """Complete, though a unit that it reads is not: it stays where that comes out as it did."""
        read = [unit.folder / MANIFEST for unit in self.upstream()]
        return (self.folder / MANIFEST).exists() and not all(manifest.exists() for manifest in read)

    def damage(self, copies: bool = True) -> str | None:
        """What is wrong with the files of a unit that has a manifest. copies: also with them, where there are any."""
        manifest = self.manifest()
        return damage(self.folder, manifest["outputs"], manifest.get("copies", {}) if copies else {})

    def check(self, outside: bool = True) -> None:
        """Raises UserError unless the unit is complete. outside: as of `look`."""
        complete, objection = self.look(outside)
        if not complete:
            again = " --rerun" if objection else ""
            raise UserError(
                f"{self.folder}: {objection or 'not complete'}; run `allo-fast {self.name} CONFIG{again}` first"
            )

    def execute(self) -> Iterator[Progress]:
        """Runs or continues the stage; the manifest comes last, so that nothing half-written looks complete.

        What is refused before it has made anything leaves no trace. Raises UserError where something lies there that
        does not fit, unless the run is one that moves it aside.
        """
        new, self.mark = ranks.on_main(self._start)
        device, first = pick_device(self.config.model.device), True
        memory.reset_peak(device)
        begun, work = time.perf_counter(), self.stage.execute(self)
        while True:
            try:
                progress = next(work)
                if first and ranks.is_main():  # alone: another rank may be elsewhere when it has its first progress
                    self._look_again()
            except StopIteration as end:
                facts = end.value
                break
            except (UserError, OSError):
                if new and ranks.is_main():
                    self.owner.home.undo(self.place)
                raise
            if first and ranks.is_main():
                self.owner.home.take_config(self.config, self.owner.rerun)
            new = first = False
            yield progress
        seconds, peak = time.perf_counter() - begun, memory.peak_bytes(device)  # of this session
        ranks.on_main(lambda: self._finish(facts, seconds, peak))

    def _look_again(self) -> None:
        """Raises UserError where what it was begun from changed until all was read; later changes reach nothing."""
        if changed := differences(recorded(self.folder), self.basis(outside=False) | self.outside()):
            raise UserError(f"{self.folder}: {changed}, while it was read; give the same command again")

    def _exists(self) -> bool:
        return self.folder.exists() and any(not path.match(LEFTOVERS) for path in self.folder.iterdir())

    def _start(self) -> tuple[bool, str]:
        """Whether nothing had been there, and the mark."""
        basis = self.basis()
        _, objection = self.look()
        if objection and not self.owner.rerun:
            raise UserError(
                f"{self.folder}: {objection}. It stays as it is; --rerun moves it to {self.owner.home.aside.name} and "
                "makes it anew"
            )
        if objection:
            self.owner.home.set_aside(self.place)
        if new := not self._exists():
            if whole := self.owner.home.finished(self.place, basis):
                if not self.owner.rerun:
                    shutil.rmtree(self.folder, ignore_errors=True)  # what a killed write left
                    raise UserError(f"{whole}: the same, whole; `mv {whole} {self.folder}`, or --rerun makes it anew")
                logger.warning("%s: made anew, though %s is the same, whole", self.folder, whole)
            write_json(self.folder / STARTED, {"basis": basis, "versions": versions()})
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
            "outputs": identities(self.folder, self.stage.outputs),
            "copies": identities(self.folder, self.stage.copies),
            "logs": identities(self.folder, (LOG,)),
            "versions": versions(),
        }
        write_json(self.folder / MANIFEST, manifest)
        self.tidy()

    def tidy(self) -> None:
        """The run is one with these settings; what a complete unit needs no more is removed, which a kill may leave."""
        self.owner.home.take_config(self.config, self.owner.rerun)
        for pattern in (STARTED, CHECKPOINTS, BESTS, f"*{SUMS}"):
            for path in self.folder.glob(pattern):
                path.unlink()
        for path in [self.folder / SCRATCH, *self.folder.rglob(LEFTOVERS), *self.folder.parent.glob(LEFTOVERS)]:
            shutil.rmtree(path, ignore_errors=True)
