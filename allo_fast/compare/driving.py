"""Runs of a comparison one after another: those that choose, of each arm then the final one, and what they say."""

import hashlib
import json
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from allo_fast import signals
from allo_fast.compare.arms import Arm, Comparison, Trial
from allo_fast.compare.results import Tried, results, sentences, table, values_of
from allo_fast.compare.sharing import alone_with, take
from allo_fast.config import UserError
from allo_fast.durable import locked
from allo_fast.runs.home import MANIFEST
from allo_fast.runs.lock import Busy, alone_in
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages import STAGES, stages_of
from allo_fast.stages.check import require, was_checked
from allo_fast.stages.driving import hidden_updates
from allo_fast.stages.unread import unread_keys
from allo_fast.training.engine import TrainingError

logger = logging.getLogger(__name__)

_SECONDS = 2.0  # between two looks at a run that another command works on
Show = Callable[[str, Iterator[Progress]], object]  # drives a unit, with its label


def compare(comparison: Comparison, show: Show, rerun: bool = False) -> Iterator[str]:
    """Yields lines for whoever waits. Several commands may work on one comparison: each run is made by one of them."""
    arms = comparison.arms
    choosing = {arm.name: comparison.development(arm) for arm in arms}
    clock = Clock(
        [
            *(trial for trials in choosing.values() for trial in trials),
            *(_likely_final(comparison, arm) for arm in arms),
        ]
    )
    yield f"{comparison.folder}: {len(arms)} arms, {clock.runs} runs, {len(clock.waiting)} stages to go{clock.left}"
    _check(arms, choosing, comparison)
    worker = Worker(comparison, show, rerun, clock)
    chosen: dict[str, tuple[Trial, Tried]] = {}
    failed: dict[str, str] = {}  # arms
    waiting = deque(trial for trials in choosing.values() for trial in trials)
    for arm in arms:
        if not choosing[arm.name]:
            chosen[arm.name] = comparison.final(arm, arm.candidates[0]), []
            waiting.append(chosen[arm.name][0])
    tried: dict[Path, float] = {}  # by folder
    for trial in worker.complete(waiting):
        name, candidates = trial.arm.name, choosing[trial.arm.name]
        why = worker.failed.get(trial.folder)
        mean = -math.inf if why else _mean(trial, comparison)
        where = "data.test" if name in chosen else "development data"
        yield f"{trial.label}: {why or f'{mean:.1%} on {where}'}{clock.left}"
        if name in chosen:
            failed |= {name: why} if why else {}
            continue
        tried[trial.folder] = mean
        if all(candidate.folder in tried for candidate in candidates):
            scores = [(tried[candidate.folder], candidate.values) for candidate in candidates]
            best, values = max(scores, key=lambda pair: pair[0])
            clock.drop(_likely_final(comparison, trial.arm))
            if math.isfinite(best):
                chosen[name] = comparison.final(trial.arm, values), scores
                waiting.append(chosen[name][0])
                clock.add(chosen[name][0])
            else:
                failed[name] = "no candidate could be trained"
                yield f"{name}: left out, as {failed[name]}"
    made = [chosen[arm.name] for arm in arms if arm.name in chosen and arm.name not in failed]
    with locked(comparison.folder / ".locks" / "results"):
        metric, rows = results(comparison, made, failed)
    yield table(rows, metric)
    yield from sentences(rows)
    yield str(comparison.folder / "compare.md")


def _likely_final(comparison: Comparison, arm: Arm) -> Trial:
    """For the time that it takes, whichever candidate is the best."""
    return comparison.final(arm, arm.candidates[0])


def _mean(trial: Trial, comparison: Comparison) -> float:
    run = Run(trial.config, STAGES, folder=trial.folder)
    return float(values_of(run, preference=comparison.config.metric)[1].mean())


def _check(arms: Sequence[Arm], choosing: dict[str, list[Trial]], comparison: Comparison) -> None:
    """Raises UserError for what would end one of the runs later, or is set for an arm that does not read it."""
    for arm in arms:
        trial = comparison.final(arm, arm.candidates[0])
        own = {*arm.settings, *trial.values}
        for why, keys in unread_keys(trial.config):
            if idle := own & {*keys}:
                raise UserError(f"arms: {arm.name}: {', '.join(sorted(idle))} is not read: {why}")
        for each in [*choosing[arm.name][: arm is arms[0]], trial]:  # reading a data set takes its time
            if not was_checked(each.folder):
                try:
                    require(each.config)
                except UserError as error:
                    raise UserError(f"arms: {each.label}: {error}") from None


@dataclass
class Worker:
    """failed: by a trial's folder, what ended its training; too high a rate ends its own trial alone."""

    comparison: Comparison
    show: Show
    rerun: bool
    clock: "Clock"
    failed: dict[Path, str] = field(default_factory=dict)

    def complete(self, waiting: deque[Trial]) -> Iterator[Trial]:
        """Each when it is complete, of which there may come more; those that other commands work on last."""
        busy = 0
        while waiting:
            trial = waiting.popleft()
            try:
                with alone_in(trial.folder):
                    self._make(trial)
            except Busy:
                waiting.append(trial)
                busy += 1
                if busy >= len(waiting):
                    signals.check()
                    time.sleep(_SECONDS)
                continue
            except TrainingError as error:
                self.failed[trial.folder] = f"not trained: {error}"
                self.clock.drop(trial)
            busy = 0
            yield trial

    def _make(self, trial: Trial) -> None:
        folder = self.comparison.folder
        try:
            run = Run(trial.config, STAGES, self.rerun, cache=folder / "cache")
        except UserError as error:
            raise UserError(str(error).split(". ")[0] + "; `allo-fast compare FILE --rerun` makes it anew") from None
        for unit in run.units(stages_of(trial.config)):
            if not unit.is_complete():
                with alone_with(unit, folder):
                    self._complete(trial, unit)
            unit.tidy()

    def _complete(self, trial: Trial, unit: Unit) -> None:
        """What lies there and does not fit is moved aside, or refused, before another run's takes its place."""
        if self.rerun and unit.look()[1]:
            unit.owner.home.set_aside(unit.place)
        if unit.folder.exists() or not take(unit, self.comparison.folder):
            self._execute(trial, unit)
        self.clock.made(unit)

    def _execute(self, trial: Trial, unit: Unit) -> None:
        label = f"{trial.label}: {unit.name} {unit.key}"
        self.show(label, unit.execute())
        if warning := hidden_updates(trial.config.model, unit.manifest()["facts"]):
            logger.warning("%s: %s", label, warning)


class Clock:
    """How long is left, by what stages took so far; runs share stages, each of which is counted once."""

    def __init__(self, trials: Sequence[Trial]):
        self.runs = len(trials)
        self._seconds: dict[str, list[float]] = defaultdict(list)  # by stage
        self._equal: dict[str, list[Unit]] = defaultdict(list)  # by signature; one of them will be made
        for trial in trials:
            self.add(trial)

    def add(self, trial: Trial) -> None:
        for unit in Run(trial.config, STAGES, folder=trial.folder).units(stages_of(trial.config)):
            self._equal[_signature(unit)].append(unit)
            if (unit.folder / MANIFEST).exists():
                self.made(unit)

    def drop(self, trial: Trial) -> None:
        """It is not waited for any more."""
        for signature, units in list(self._equal.items()):
            self._equal[signature] = [unit for unit in units if unit.owner.home.folder != trial.folder]
            if not self._equal[signature]:
                del self._equal[signature]

    def made(self, unit: Unit) -> None:
        with suppress(UserError):  # damaged, which is said when it is its turn
            self._seconds[unit.name].append(unit.manifest()["seconds"])

    @property
    def waiting(self) -> list[str]:
        """The stage of each unit that no command has made yet."""
        made = [any((unit.folder / MANIFEST).exists() for unit in units) for units in self._equal.values()]
        return [units[0].name for units, is_made in zip(self._equal.values(), made, strict=True) if not is_made]

    @property
    def left(self) -> str:
        """In words; a stage that has not run yet counts nothing, which is said."""
        if not (waiting := self.waiting):
            return ""
        known = [fmean(self._seconds[name]) for name in waiting if name in self._seconds]
        if not known:
            return ", whose time is known when they have run once"
        unknown = {*waiting} - {*self._seconds}
        beside = f" beside {', '.join(sorted(unknown))}" if unknown else ""
        return f"; about {sum(known) / 60:.0f} minutes of one process left{beside}"


def _signature(unit: Unit) -> str:
    """Of what it is made from, as far as the settings say: files are not read."""
    parts = [unit.name, unit.seed, unit.settings(), sorted(map(_signature, unit.upstream()))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
