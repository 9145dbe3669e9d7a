"""The runs that drills begin from, each made once, when a drill first asks for it."""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import transformers

from tests.drills import jobs, process
from tests.drills.lab import Lab, contents, copy_to
from tests.drills.run import (
    BASE_EVALUATED,
    CONFIG,
    FORGET,
    LEARN,
    LOCATE,
    PRETRAIN,
    PRETRAIN_JOB,
    REWARDS,
    RUN,
    SAMPLE,
    UNITS,
    WARMUP,
    stop_after,
    write_job,
)

# Where a run was killed: the unit, and how much was done; between two checkpoints, behind two chunks of rows.
KILLED = {
    "sample": (SAMPLE, partial(stop_after, "sample", 6)),
    "warmup": (WARMUP, partial(stop_after, "warmup", 5, noun="step")),
    "locate": (LOCATE, partial(stop_after, "locate", 20)),
    "rewards": (REWARDS, partial(stop_after, "rewards", 3, noun="step")),
    "forget": (FORGET, partial(stop_after, "forget", 3, noun="step")),
    "learn": (LEARN, partial(stop_after, "learn", 7, noun="step")),
    "evaluate": (BASE_EVALUATED, partial(stop_after, "evaluate", 4)),
}


class States:
    """`lab(name)` is a new copy of a state: fresh (the job, no run), finished, pretrain (its job), killed-STAGE."""

    def __init__(self):
        transformers.utils.logging.disable_progress_bar()
        self._held = tempfile.TemporaryDirectory(prefix="drills-")
        self.folder = Path(self._held.name).resolve()
        self._makers: dict[str, Callable[[Path], object]] = {
            "pretrain": self._pretrain,
            "fresh": self._fresh,
            "preferences": jobs.preferences,
            "chat": jobs.chat,
            "finished": self._finished,
            **{f"killed-{stage}": partial(self._killed, *KILLED[stage]) for stage in KILLED},
        }
        self._numbers = iter(range(1 << 30))
        self.path("finished")

    def close(self) -> None:
        self._held.cleanup()

    def add(self, name: str, make: Callable[[Path], object]) -> None:
        """make(folder) fills the folder of a state."""
        self._makers[name] = make

    def path(self, name: str) -> Path:
        folder = self.folder / name
        if not folder.exists():
            self._makers[name](folder)
        return folder

    def lab(self, name: str) -> Lab:
        folder = self.folder / f"lab-{next(self._numbers)}"
        copy_to(self.path(name), folder)
        units = UNITS if name in ("fresh", "finished") else [unit for unit in UNITS if (folder / RUN / unit).exists()]
        return Lab(folder, contents(self.path("finished") / RUN), units, self.path)

    def _pretrain(self, folder: Path) -> None:
        folder.mkdir()
        (folder / CONFIG).write_text(PRETRAIN_JOB)

    def _fresh(self, folder: Path) -> None:
        made = self.folder / "pretrained"
        copy_to(self.path("pretrain"), made)
        _must(process.warm_up(["pretrain", CONFIG], made))
        folder.mkdir()
        shutil.copytree(made / RUN / PRETRAIN / "model", folder / "base")
        write_job(folder)

    def _finished(self, folder: Path) -> None:
        copy_to(self.path("fresh"), folder)
        _must(process.warm_up(["run", CONFIG], folder))
        _must(process.run(["run", CONFIG], folder))  # whatever a second command writes

    def _killed(self, unit: str, stop: Callable[[], Callable], folder: Path) -> None:
        copy_to(self.path("finished"), folder)
        for later in UNITS[UNITS.index(unit) :]:
            shutil.rmtree(folder / RUN / later)
        for name in ("report.html", "summary.json"):
            (folder / RUN / name).unlink()
        done = process.run(["run", CONFIG], folder, stop())
        assert done.code == -9, done.err


def _must(done: process.Done) -> None:
    assert done.code == 0, done.err
