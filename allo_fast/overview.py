"""`allo-fast status`: what of a run is done, what was begun, what is to come, and how long that may take."""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from allo_fast.compare.rounds import later_rounds
from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.durable import Damaged, read_json
from allo_fast.runs.home import MANIFEST, STARTED
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, stages_of
from allo_fast.training.metrics import LOG

DONE, BEGUN, TO_COME, DAMAGED = "done", "begun", "to come", "damaged"


@dataclass(frozen=True)
class State:
    """Of a unit. seconds: that it took, or so far; left: that it may take, where anything says so."""

    name: str
    state: str
    seconds: float = 0.0
    left: float | None = None
    steps: str = ""


def overview(run: Run) -> list[State]:
    """Of every unit of all rounds, as the files say; nothing is checked or changed."""
    units = [("", unit) for unit in run.units(stages_of(run.config))]
    for runs in later_rounds(run, making=False):
        units += [(f"{made.config.name} ", unit) for made in runs for unit in made.units(stages_of(made.config))]
    states, took = [_state(unit, prefix) for prefix, unit in units], defaultdict(list)
    for (_, unit), state in zip(units, states, strict=True):
        took[unit.name] += [state.seconds] if state.state == DONE else []
    return [
        replace(state, left=median(took[unit.name])) if state.left is None and took[unit.name] else state
        for (_, unit), state in zip(units, states, strict=True)
    ]


def _state(unit: Unit, prefix: str) -> State:
    """left: None where nothing of the unit itself says."""
    name = f"{prefix}{unit.stage.number:02d}-{unit.name} {unit.key}"
    if (unit.folder / MANIFEST).exists():
        try:
            return State(name, DONE, read_json(unit.folder / MANIFEST)["seconds"], 0.0)
        except (Damaged, KeyError, TypeError):
            return State(name, DAMAGED)
    if not (unit.folder / STARTED).exists():
        return State(name, TO_COME)
    if not (rows := _logged(unit)):
        return State(name, BEGUN)
    left = (rows[-1]["total_steps"] - rows[-1]["step"]) * median(row["seconds"] for row in rows)
    steps = f"step {rows[-1]['step']} of {rows[-1]['total_steps']}"
    return State(name, BEGUN, sum(row["seconds"] for row in rows), left, steps)


def _logged(unit: Unit) -> list[dict]:
    """What a log, which may be written just now, has before its first line that is none."""
    rows = []
    for line in (unit.folder / LOG).read_bytes().splitlines() if (unit.folder / LOG).exists() else ():
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in ("step", "total_steps", "seconds")})
        except (ValueError, KeyError, TypeError):
            break
    return rows


def lines(states: list[State]) -> Iterator[str]:
    """As text: a line a unit, and what is left in all."""
    width = max(len(state.name) for state in states)
    for state in states:
        spent = clock(state.seconds) if state.seconds else ""
        left = f"{clock(state.left)} left" if state.left else ""
        yield f"{state.name:<{width}}  {state.state:<9}{state.steps:<18}{spent:>10}  {left}".rstrip()
    known, unknown = sum(state.left or 0.0 for state in states), sum(state.left is None for state in states)
    more = [f"about {clock(known)} left"] if known else []
    more += [f"of {unknown} nothing is known yet"] if unknown else []
    yield "; ".join([f"{sum(state.state == DONE for state in states)} of {len(states)} done", *more])


def clock(seconds: float) -> str:
    """In units that a reader thinks in."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def print_status(options: argparse.Namespace) -> None:
    """options.run: the folder of a run, or a config, whose run may not have begun."""
    if options.run.is_dir():
        if options.overrides:
            raise UserError(f"{options.overrides[0]}: {options.run} is a folder, which has its settings")
        run = Run.read(options.run, STAGES)
    else:
        config = load_config(options.run, options.overrides)
        run = Run(config, STAGES, folder=Path(config.output_dir) / config.name)
    print("\n".join(lines(overview(run))))
