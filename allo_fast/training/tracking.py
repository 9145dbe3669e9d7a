"""What training says of each step, as it says it, for TensorBoard or Weights & Biases."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from allo_fast.errors import UserError
from allo_fast.training.metrics import StepMetrics

_ABOUT = ("step", "total_steps", "tokens")  # of a row, no curves


def require(report_to: str) -> None:
    """Raises UserError where the package is not installed."""
    try:
        if report_to != "none":
            importlib.import_module(report_to)
    except ImportError:
        raise UserError(f"report_to: {report_to} is not installed: pip install {report_to}") from None


@contextmanager
def tracking(report_to: str, folder: Path, name: str, config: dict) -> Iterator[Callable[[StepMetrics], None]]:
    """What takes a step's metrics. Raises UserError where the package is not installed.

    folder: of the run. name: of the training in it. TensorBoard's curves go on where a session was killed; in Weights &
    Biases each session is a run of its own, those of a run in one group, with its config, and their own environment
    variables apply (WANDB_PROJECT, WANDB_MODE, ...).
    """
    require(report_to)
    yield from _TRACKERS[report_to](folder, name, config)


def _tensorboard(folder: Path, name: str, config: dict) -> Iterator[Callable[[StepMetrics], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def record(metrics: StepMetrics) -> None:
        if not writers:
            writers.append(SummaryWriter(folder / "tensorboard" / name, purge_step=metrics.step))
        for key, value in _curves(metrics):
            writers[0].add_scalar(key, value, metrics.step)
        writers[0].flush()

    try:
        yield record
    finally:
        for writer in writers:
            writer.close()


def _wandb(folder: Path, name: str, config: dict) -> Iterator[Callable[[StepMetrics], None]]:
    import wandb

    about = {"name": f"{config['name']} {name}", "group": config["name"], "config": config}
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", "allo-fast"), dir=folder, **about)
    try:
        yield lambda metrics: run.log(dict(_curves(metrics)), step=metrics.step)
    finally:
        run.finish()


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _curves(metrics: StepMetrics) -> Iterator[tuple[str, float]]:
    return ((key, value) for key, value in metrics.row().items() if key not in _ABOUT)
