"""A run as a whole: its units, and whether the folder is its own."""

from collections.abc import Iterable
from pathlib import Path

from allo_fast import ranks
from allo_fast.config import Config, UserError
from allo_fast.config_file import load_config
from allo_fast.runs.home import CONFIG, Home
from allo_fast.runs.unit import Stage, Unit
from allo_fast.training.zero import Zero


class Run:
    """Raises UserError when the folder holds something else: another run, or files that are not a run's.

    rerun: accept changed settings and run again what they affect. zeros: how DeepSpeed trains "dense" and "sparse"
    stages; None: one process. folder: where a run lies that is to be read, nothing claimed; None: output_dir/name.
    cache: as of `Home`.
    """

    def __init__(
        self,
        config: Config,
        stages: dict[str, Stage],
        rerun: bool = False,
        zeros: dict[str, Zero] | None = None,
        folder: Path | None = None,
        cache: Path | None = None,
    ):
        self.config, self.stages, self.rerun = config, stages, rerun
        self.zeros = zeros or {"dense": None, "sparse": None}
        self.home = Home(folder or Path(config.output_dir) / config.name, cache)
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
            raise UserError(f"{folder}: not the folder of a run, as runs/NAME (it has no {CONFIG})")
        return cls(load_config(path), stages, folder=folder)

    def _claim(self) -> None:
        if not self.home.is_begun:
            self.home.check_free()
        for unit in () if self.rerun else self.units(self.stages):
            if changed := unit.changed_settings():
                raise UserError(
                    f"{self.folder} holds another run: {changed}. Give this one a name of its own (name=...), run "
                    f"again what the change affects (`allo-fast run CONFIG --rerun`), or name {self.folder / CONFIG}"
                )

    def units(self, names: Iterable[str]) -> list[Unit]:
        return [Unit(self, name, key) for name in names for key in self.stages[name].keys(self.config)]
