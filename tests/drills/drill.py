"""The list of drills, which the files of their kinds fill."""

import fnmatch
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.drills.lab import GRADES, Lab, Verdict
from tests.drills.states import States

Work = Callable[[Lab], Verdict]
DRILLS: list["Drill"] = []


@dataclass(frozen=True)
class Drill:
    """variants: what is done to a new copy of `state` in each. slow: only where it is asked for; ranks: with --ranks
    alone. section: as in the table."""

    section: str
    title: str
    state: str
    variants: Mapping[str, Work]
    slow: bool = False
    ranks: bool = False

    @property
    def name(self) -> str:
        return f"{self.section}: {self.title}"

    def matches(self, pattern: str) -> bool:
        return fnmatch.fnmatch(self.name.lower(), f"*{pattern.lower()}*")

    def run(self, states: States) -> tuple[Verdict, float]:
        """The worst of its variants, and the seconds that all of them took."""
        begun, found = time.perf_counter(), []
        for name, work in self.variants.items():
            lab = states.lab(self.state)
            try:
                verdict = work(lab)
            except AssertionError as error:  # its fault does not fit what is there
                verdict = Verdict("unclear", f"the drill could not be held: {error}")
            lab.remove()
            said = f"{name}: {verdict.said}" if len(self.variants) > 1 else verdict.said
            found.append(Verdict(verdict.grade, said, verdict.lost))
        worst = max(found, key=lambda verdict: GRADES.index(verdict.grade))
        return worst, time.perf_counter() - begun


def drill(section: str, title: str, state: str, **kind: bool) -> Callable[[Work], Work]:
    """Adds what it decorates."""

    def add(work: Work) -> Work:
        DRILLS.append(Drill(section, title, state, {"": work}, **kind))
        return work

    return add


def table(section: str, state: str, work: Callable[..., Verdict], rows: Mapping[str, object], **kind: bool) -> None:
    """A drill for each title of `rows`: work(lab, its value); of a dictionary, a variant for each of its values."""
    for title, value in rows.items():
        values = value if isinstance(value, Mapping) else {"": value}
        variants = {name: lambda lab, value=held: work(lab, value) for name, held in values.items()}
        DRILLS.append(Drill(section, title, state, variants, **kind))
