"""The folder of a run as a whole: its config.yaml, and old-N, where what is replaced is kept."""

import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count
from pathlib import Path, PurePath

from allo_fast.config import Config, UserError
from allo_fast.config_file import dump_config, load_config
from allo_fast.durable import LEFTOVERS, Damaged, make_folder, move, read_json, write_bytes
from allo_fast.runs.basis import Basis, deciding, differences, flat
from allo_fast.runs.contents import damage

logger = logging.getLogger(__name__)

MANIFEST, STARTED = "MANIFEST.json", "STARTED.json"  # of a unit
CONFIG, LOG = "config.yaml", "log.txt"
_SAID = SUMMARY, REPORT, ROUNDS = "summary.json", "report.html", "rounds.json"
# Where a run lies, how it is continued and how much of it is kept, not what it is.
_ELSEWHERE = {key: True for key in ("name", "output_dir", "deepspeed", "ddp_timeout", "save_models", "rounds")}
_ELSEWHERE["model"] = {"device"}


def recorded(unit: Path) -> Basis:
    """What a unit was made, or begun, from. Raises Damaged."""
    path = next((path for path in (unit / MANIFEST, unit / STARTED) if path.exists()), None)
    if not path:
        raise Damaged(f"{unit / MANIFEST} is gone")
    if "basis" not in (record := read_json(path)):
        raise Damaged(f"{path}: of another version, which did not say what it depends on")
    return deciding(record["basis"])


@cache
def _config_of(path: Path, size: int, changed: int) -> Config:
    return load_config(path)


@dataclass
class Home:
    """cache: of what could be computed again, perhaps of several runs; None: in the folder."""

    folder: Path
    cache: Path | None = None

    def __post_init__(self):
        self.cache = self.cache or self.folder / "cache"

    @property
    def is_begun(self) -> bool:
        """Whether any unit is."""
        return any(any(self.folder.glob(f"[0-9][0-9]-*/*/{name}")) for name in (STARTED, MANIFEST))

    def check_free(self) -> None:
        """Raises UserError where files of others lie in the folder; what a killed write left is nobody's, and a log is
        there before a run is."""
        if (self.folder / CONFIG).is_file():
            return
        files = (path.relative_to(self.folder) for path in self.folder.rglob("*") if not path.is_dir())
        others = (file for file in files if file != PurePath(LOG))
        if any(not any(PurePath(part).match(LEFTOVERS) for part in file.parts) for file in others):
            raise UserError(f"{self.folder}: not empty, and not the folder of a run (it has no {CONFIG})")

    def take_config(self, config: Config, rerun: bool) -> None:
        """Writes config.yaml, where another or none is there; what changes is said.

        Where what decides changes, or somebody wrote it, it is kept, with the summary that was of it.
        """
        path, is_ours = self.folder / CONFIG, True
        if path.exists():
            try:
                stat = path.stat()
                if (old := _config_of(path, stat.st_size, stat.st_mtime_ns)) == config:
                    return
                is_ours = dump_config(old) == path.read_text()
                before, now = (flat(each.model_dump(exclude=_ELSEWHERE)) for each in (old, config))
                changed, rerun = differences(before, now), rerun or deciding(before) != deciding(now)
            except UserError as error:
                is_ours, changed = False, str(error)
            if changed:
                logger.info("%s: %s", path, changed)
        if rerun or not is_ours:
            self._put_aside()
        write_bytes(path, dump_config(config).encode())

    @cached_property
    def aside(self) -> Path:
        """Where this command puts what it replaces."""
        return next(path for number in count(1) if not (path := self.folder / f"old-{number}").exists())

    def set_aside(self, place: Path) -> None:
        """Moves a unit there, with what was said of the whole run. Raises UserError where that is on another disk."""
        if (self.folder / place).lstat().st_dev != self.folder.stat().st_dev:
            raise UserError(
                f"{self.folder / place}: lies on another disk; move it to {self.aside / place}, or elsewhere, yourself"
            )
        make_folder((self.aside / place).parent)
        move(self.folder / place, self.aside / place)
        self._put_aside()
        logger.info("%s: moved to %s", self.folder / place, self.aside / place)

    def finished(self, place: Path, basis: Basis) -> Path | None:
        """Where a whole unit of this basis lies that was set aside, as a command that is killed may leave it."""
        for manifest in sorted(self.folder.glob(f"old-*/{place}/{MANIFEST}")):
            with suppress(UserError):
                if recorded(unit := manifest.parent) == basis and not damage(unit, read_json(manifest)["outputs"], {}):
                    return unit
        return None

    def undo(self, place: Path) -> None:
        """Takes away a unit that came to nothing, at once, and puts back what this command moved for it."""
        nothing = (self.folder / place).with_name(f".{place.name}.partial")
        shutil.rmtree(nothing, ignore_errors=True)
        move(self.folder / place, nothing)
        shutil.rmtree(nothing, ignore_errors=True)  # of a link to a folder elsewhere, the link stays
        if (self.aside / place).exists():
            move(self.aside / place, self.folder / place)
            logger.info("%s: moved back", self.folder / place)
            if not any(self.aside.glob("*/*")):  # of units
                for path in (self.aside / name for name in (CONFIG, *_SAID)):
                    if path.exists():
                        move(path, self.folder / path.name)
                shutil.rmtree(self.aside)

    def _put_aside(self) -> None:
        """A copy of config.yaml, and the summary and report, which are not those of the run any more."""
        if (config := self.folder / CONFIG).exists() and not (self.aside / CONFIG).exists():
            write_bytes(self.aside / CONFIG, config.read_bytes())
        for name in _SAID:
            if (self.folder / name).exists() and not (self.aside / name).exists():
                make_folder(self.aside)
                move(self.folder / name, self.aside / name)
