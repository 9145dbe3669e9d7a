"""`allo-fast status`: what of a run is done, what was begun, what is to come, and how long that may take."""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from allo_fast.config_file import load_config
from allo_fast.durable import read_json
from allo_fast.runs.home import MANIFEST, STARTED
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, stages_of
from allo_fast.training.metrics import LOG

DONE, BEGUN, TO_COME = "done", "begun", "to come"


@dataclass(frozen=True)
class State:
    """Of a unit. seconds: that it took, or so far; left: that it may take, where anything says so."""

    name: str
    state: str
    seconds: float = 0.0
    left: float | None = None
    steps: str = ""


def overview(run: Run) -> list[State]:
    """Of every unit, as the files say; nothing is checked or changed."""
    units = run.units(stages_of(run.config))
    took = defaultdict(list)  # by stage, of what is done
    for unit in units:
        if (unit.folder / MANIFEST).exists():
            took[unit.name].append(read_json(unit.folder / MANIFEST)["seconds"])
    return [_state(unit, took[unit.name]) for unit in units]


def _state(unit: Unit, took: list[float]) -> State:
    """took: the seconds of the same stage's units that are done."""
    name, expected = f"{unit.stage.number:02d}-{unit.name} {unit.key}", median(took) if took else None
    if (unit.folder / MANIFEST).exists():
        return State(name, DONE, read_json(unit.folder / MANIFEST)["seconds"], 0.0)
    if not (unit.folder / STARTED).exists():
        return State(name, TO_COME, left=expected)
    if not (rows := _logged(unit)):
        return State(name, BEGUN, left=expected)
    step, steps = rows[-1]["step"], rows[-1]["total_steps"]
    left = (steps - step) * median(row["seconds"] for row in rows)
    return State(name, BEGUN, sum(row["seconds"] for row in rows), left, f"step {step} of {steps}")


def _logged(unit: Unit) -> list[dict]:
    """Whole lines of a log that may be written just now."""
    if not (path := unit.folder / LOG).exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def lines(states: list[State]) -> Iterator[str]:
    """As text: a line a unit, and what is left in all."""
    for state in states:
        spent = clock(state.seconds) if state.seconds else ""
        left = f"{clock(state.left)} left" if state.left else ""
        yield f"{state.name:<32} {state.state:<9}{state.steps:<18}{spent:>10}  {left}".rstrip()
    known, unknown = sum(state.left or 0.0 for state in states), sum(state.left is None for state in states)
    more = [f"about {clock(known)} left"] if known else []
    more += [f"of {unknown} nothing is known yet"] if unknown else []
    yield "; ".join([f"{sum(state.state == DONE for state in states)} of {len(states)} done", *more])


def clock(seconds: float) -> str:
    """In units that a reader thinks in."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def print_status(options: argparse.Namespace) -> None:
    """options.run: the folder of a run, or a config, whose run may not have begun."""
    if options.run.is_dir():
        run = Run.read(options.run, STAGES)
    else:
        config = load_config(options.run, options.overrides)
        run = Run(config, STAGES, folder=Path(config.output_dir) / config.name)
    print("\n".join(lines(overview(run))))
