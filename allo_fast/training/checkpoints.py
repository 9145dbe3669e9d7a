"""The last two checkpoints of a stage's training, checkpoint-STEP.safetensors, and which of them it goes on from.

Beside them best-STEP.safetensors, the weights that either of them knows as the best, where training is to leave those.
"""

import logging
import shutil
from pathlib import Path

from allo_fast.durable import Damaged, about_of, open_tensors, versions

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoint-*.safetensors"
BESTS = "best-*.safetensors"
_KEPT = 2


class Checkpoints:
    """Of training in `folder`; rank 0 calls. mark: of what; those of something else are not taken."""

    def __init__(self, folder: Path, mark: str):
        self.folder, self.mark = folder, mark
        self._refused: set[int] = set()

    @property
    def about(self) -> dict:
        """What each says of itself."""
        return {"mark": self.mark, "versions": versions()}

    def path(self, step: int) -> Path:
        return self.folder / CHECKPOINTS.replace("*", str(step))

    def best(self, step: int) -> Path:
        return self.folder / BESTS.replace("*", str(step))

    def newest(self) -> Path | None:
        """The last that is whole and of this training; what is passed over is said."""
        for step in reversed(steps := self._steps()):
            if not (why := self._objection(path := self.path(step))):
                return path
            self._refused.add(step)
            before = f"the one of step {steps[at - 1]}" if (at := steps.index(step)) else "the beginning"
            logger.warning("%s; training goes on from %s", why, before)
        return None

    def make_room(self) -> None:
        """Where one more does not fit on the disk, those that were refused go first, then the older of two."""
        good = self._good()
        for step in [*{*self._steps()} - {*good}, *good[:-1]]:
            if shutil.disk_usage(self.folder).free >= (path := self.path(step)).stat().st_size:
                break
            path.unlink()

    def prune(self, step: int) -> None:
        """Keeps the one of `step`, which is new, and the one before it."""
        self._refused.discard(step)
        kept = [older for older in self._good() if older <= step][-_KEPT:]
        for other in {*self._steps()} - {*kept}:
            self.path(other).unlink()
        self._prune_bests()

    def make_room_for_best(self) -> None:
        """What was the best since the last checkpoint goes, too."""
        self._prune_bests()
        self.make_room()

    def _prune_bests(self) -> None:
        """Keeps those that a checkpoint knows."""
        known = {self.best(at) for step in self._good() if (at := _about(self.path(step)).get("best")) is not None}
        for path in {*self.folder.glob(BESTS)} - known:
            path.unlink()

    def _good(self) -> list[int]:
        return [step for step in self._steps() if step not in self._refused]

    def _steps(self) -> list[int]:
        numbers = [path.stem.partition("-")[2] for path in self.folder.glob(CHECKPOINTS)]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _objection(self, path: Path) -> str | None:
        try:
            with open_tensors(path) as file:
                about = about_of(file)
        except Damaged as error:
            return str(error)
        if about.get("mark") != self.mark:
            return f"{path}: of another stage, run or setting"
        if path.name.startswith("checkpoint") and "watched" not in about:
            return f"{path}: of an earlier version"
        return None if about.get("best") is None else self._objection(self.best(about["best"]))


def _about(path: Path) -> dict:
    with open_tensors(path, check=False) as file:
        return about_of(file)
