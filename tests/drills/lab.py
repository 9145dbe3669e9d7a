"""Where a drill happens: a copy of a run, commands in it, and the verdict, which is computed from what they leave."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.drills import process
from tests.drills.process import Done
from tests.drills.run import (
    ASIDE,
    CACHE,
    CHECKPOINTS,
    MANIFEST,
    NOT_COMPARED,
    PARTIAL_ROWS,
    RERUN,
    RUN,
    WALL,
    checkpoint_step,
    checkpoints,
)

GRADES = ("skipped", "good", "unclear", "silent")  # the last of several is the verdict of all


@dataclass(frozen=True)
class Verdict:
    """good: the undisturbed result, or one clear line, and nothing that was finished is lost. unclear: noticed, but a
    traceback, noise, or no way on. silent: wrong, lost or destroyed without a word."""

    grade: str
    said: str  # what happened
    lost: str = ""


@dataclass(frozen=True)
class Snapshot:
    finished: dict[tuple[int, int], Path]  # the files of complete units, by what a rename leaves as it is
    unfinished: dict[Path, bytes]  # what a unit that is not complete has so far
    steps: dict[Path, list[bytes]]  # of its metrics.jsonl, the lines up to the newest checkpoint


def units_of(run: Path) -> Iterable[Path]:
    return (folder for stage in sorted(run.glob("[0-9][0-9]-*")) for folder in sorted(stage.iterdir()))


def identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def content(path: Path) -> str:
    """A digest of a file without what differs between two runs of the same job."""
    data = path.read_bytes()
    try:
        if path.name in (MANIFEST, "summary.json"):
            data = json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
        elif path.name == "metrics.jsonl":
            data = json.dumps([_timeless(json.loads(line)) for line in data.splitlines()]).encode()
    except ValueError:  # damaged: as it is
        pass
    return hashlib.sha256(data).hexdigest()


def _timeless(value: object) -> object:
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    if not isinstance(value, dict):
        return value
    dropped = {*WALL, *({"sha256"} if "outputs" in value else ())}  # a manifest's own, and of a log with wall times
    return {
        key: _timeless(item) for key, item in value.items() if key not in dropped and not key.endswith("metrics.jsonl")
    }


def contents(run: Path) -> dict[str, str]:
    """Of every file of a run, what was moved aside and what can be computed again left out."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in NOT_COMPARED)
    names = {str(path.relative_to(run)): path for path in files}
    return {name: content(path) for name, path in sorted(names.items()) if not name.startswith((ASIDE, CACHE))}


def difference(found: dict[str, str], expected: dict[str, str]) -> str:
    """What differs, is missing or is there too much, in one line; empty where nothing does."""
    lists = {
        "other bytes": [name for name in expected if name in found and found[name] != expected[name]],
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
    }
    return "; ".join(
        f"{what}: {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
        for what, names in lists.items()
        if names
    )


@dataclass
class Lab:
    """folder: where commands run, which holds the job and perhaps a run. expected: what every file of the undisturbed
    run holds. units: those that must be there in the end. state: the folder of another state, by its name."""

    folder: Path
    expected: dict[str, str] = field(default_factory=dict)
    units: list[str] = field(default_factory=list)
    state: Callable[[str], Path] | None = None
    damaged: set[Path] = field(default_factory=set)  # by the drill: not lost when the program does away with them

    @property
    def run(self) -> Path:
        return self.folder / RUN

    def allo(self, *words: object, **options) -> Done:
        return process.run([*map(str, words)], self.folder, **options)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def damage(self, path: Path, data: bytes) -> None:
        """Overwritten in place: a file that rots keeps its inode."""
        self.damaged.add(path)
        path.write_bytes(data)

    def snapshot(self) -> Snapshot:
        finished, unfinished, steps = {}, {}, {}
        for unit in units_of(self.run):
            files = [path for path in unit.rglob("*") if path.is_file() and path not in self.damaged]
            if (unit / MANIFEST).exists():
                finished |= {identity(path): path for path in files if str(path.relative_to(self.run)) in self.expected}
                continue
            unfinished |= {path: path.read_bytes() for kind in (CHECKPOINTS, PARTIAL_ROWS) for path in unit.glob(kind)}
            whole = [path for path in checkpoints(unit) if path not in self.damaged]
            log = unit / "metrics.jsonl"
            if whole and log.exists():
                steps[unit] = log.read_bytes().splitlines()[: checkpoint_step(whole[-1])]
        return Snapshot(finished, unfinished, steps)

    def lost(self, before: Snapshot, done: Done) -> str:
        """What was there before a command and is gone, without a word where a word is enough."""
        walk = os.walk(self.run, followlinks=True)
        left = {identity(Path(folder, name)) for folder, _, names in walk for name in names}
        gone = [str(path.relative_to(self.run)) for key, path in before.finished.items() if key not in left]
        if gone:
            return f"of finished units: {', '.join(gone[:2])}" + f" and {len(gone) - 2} more" * (len(gone) > 2)
        if done.code:
            kept = (path for path in before.unfinished if path.exists())
            short = before.unfinished.keys() - {p for p in kept if p.read_bytes().startswith(before.unfinished[p])}
            return ", ".join(str(path.relative_to(self.run)) for path in sorted(short))
        return self._again(before) if not self._word_of_it(done) else ""

    def _again(self, before: Snapshot) -> str:
        """Which steps before the newest checkpoint were made again; their wall times tell."""
        for unit, lines in before.steps.items():
            log = unit / "metrics.jsonl"
            made = set(log.read_bytes().splitlines()) if log.exists() else set()
            if count := sum(line not in made for line in lines):
                return f"{count} steps of {unit.relative_to(self.run)} before its newest checkpoint"
        return ""

    def _word_of_it(self, done: Done) -> bool:
        words = {"checkpoint", "step 1", *(path.name.removesuffix(".sums") for path in self.damaged)}
        return any(word in line for line in done.lines for word in words)

    def changed(self) -> str:
        """How the run differs from the undisturbed one, in the units that must be there."""
        scope = [*self.units]

        def inside(name: str) -> bool:
            return any(name.startswith(f"{unit}/") for unit in scope) or (name[:2].isdigit() and name not in expected)

        expected = self.expected
        found = contents(self.run)
        return difference(*({name: key for name, key in side.items() if inside(name)} for side in (found, expected)))

    def resumes(
        self, *words: object, mend: Callable[[], object] | None = None, refusal: bool = False, **options
    ) -> Verdict:
        """The command must end with the undisturbed bytes; or be refused clearly, and then, once `mend` has undone the
        fault, or with what the line asks for, end with them. refusal: a refusal is an end, no way on is needed."""
        return self.judged(lambda done: self.changed(), *words, mend=mend, refusal=refusal, **options)

    def refused(self, *words: object, **options) -> Verdict:
        """The command must be refused clearly."""
        return self.judged(lambda done: "accepted", *words, refusal=True, **options)

    def judged(
        self,
        wrong: Callable[[Done], str],
        *words: object,
        mend: Callable[[], object] | None = None,
        refusal: bool = False,
        **options,
    ) -> Verdict:
        """wrong: of a command that said it went well, what is wrong with its result; empty: nothing."""
        before = self.snapshot()
        done = self.allo(*words, **options)
        lost = self.lost(before, done)
        if lost:
            return Verdict("silent" if not done.has_traceback else "unclear", done.line, lost)
        if done.code == 0 and not done.has_traceback:
            problem = wrong(done)
            if problem.startswith("left over"):
                return Verdict("unclear", problem)
            return Verdict("silent", f"exit 0; {problem}") if problem else Verdict("good", _last_word(done))
        if not done.is_clear:
            return Verdict("unclear", done.line)
        if refusal and mend is None:
            return Verdict("good", done.line)
        return self._way_on(wrong, done, words, mend, before)

    def _way_on(self, wrong, done: Done, words: tuple, mend, before: Snapshot) -> Verdict:
        """After a clear refusal: what the line names, or the same command once the fault is undone, must get there."""
        if mend:
            mend()
        elif RERUN in done.line:
            words = (*words, RERUN)
        else:
            return Verdict("unclear", f"no way on: {done.line}")
        again = self.allo(*words)
        if RERUN in words:  # what was not finished begins anew, as was asked for
            before.steps.clear()
        if lost := self.lost(before, again):
            return Verdict("silent", f"{done.line}; then {again.line}", lost)
        if again.code:
            return Verdict("unclear", f"{done.line}; then {again.line}")
        problem = wrong(again)
        return Verdict("silent" if problem else "good", f"{done.line}; then {problem or 'the same bytes'}")


def _last_word(done: Done) -> str:
    """A line that an undisturbed command does not say, where there is one."""
    words = ("checkpoint", "damaged", "again", "moved", "version", "set aside: ", "leaves out", "ignored")
    return next((line for line in done.lines if any(word in line for word in words)), "exit 0, as undisturbed")


def copy_to(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
