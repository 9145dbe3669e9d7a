"""The drills that are fast, a test each; and what the harness itself calls good, unclear and silent."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drills.flushed import unflushed
from tests.drills.injector import Operation, fault, library, operations, reason
from tests.drills.lab import Lab, contents
from tests.drills.process import Done
from tests.drills.run import LEARN, MANIFEST, RUN
from tests.drills.sections import FAST, every, fast

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> dict[str, dict]:
    """The row of each, by its name; all in one process, in which a run is made once."""
    path = tmp_path_factory.mktemp("drills") / "table.json"
    command = [sys.executable, "-m", "tests.drills", "--fast", "--json", str(path)]
    said = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert path.exists(), said.stderr
    return {f"{row['section']}: {row['title']}": row for row in json.loads(path.read_text())}


@pytest.mark.xdist_group("drills")
@pytest.mark.parametrize("name", [drill.name for drill in fast()])
def test_drill(table, name):
    row = table[name]
    if row["grade"] == "skipped":
        pytest.skip(row["said"])
    assert row["grade"] == "good", f"{row['said']} {row['lost']}"


# ---- the judge, on programs that are wrong in known ways

CLEAR = Done(2, "", "allo-fast: delta.safetensors: damaged\n")
RERUN_NAMED = Done(2, "", "allo-fast: delta.safetensors: damaged; add --rerun\n")
TRACEBACK = Done(1, "", "Traceback (most recent call last):\nKeyError: 'x'\n")


@pytest.fixture
def lab(tmp_path) -> Lab:
    """A run of one finished unit and one that is not finished."""
    learned, unfinished = tmp_path / RUN / LEARN, tmp_path / RUN / "09-evaluate/base"
    learned.mkdir(parents=True)
    unfinished.mkdir(parents=True)
    (learned / "delta.safetensors").write_text("values")
    (learned / MANIFEST).write_text(json.dumps({"seconds": 1.5, "outputs": {"metrics.jsonl": {"sha256": "a"}}}))
    (unfinished / "predictions.jsonl").write_text("one\n")
    return Lab(tmp_path, contents(tmp_path / RUN), [LEARN])


def program(lab: Lab, *acts: tuple[Done, Callable[[Path], object]]) -> None:
    """Instead of commands: each does something to the finished unit, and ends so."""
    left = list(acts)

    def allo(*words, **_) -> Done:
        done, act = left.pop(0)
        act(lab.run / LEARN)
        return done

    lab.allo = allo


def nothing(unit: Path) -> None:
    pass


def other_bytes(unit: Path) -> None:
    (unit / "delta.safetensors").write_text("other values")


def remade(unit: Path) -> None:
    shutil.rmtree(unit)
    unit.mkdir()
    (unit / "delta.safetensors").write_text("values")
    (unit / MANIFEST).write_text(json.dumps({"seconds": 9.5, "outputs": {"metrics.jsonl": {"sha256": "b"}}}))


def moved_aside(unit: Path) -> None:
    aside = unit.parents[1] / "old-1" / LEARN
    aside.parent.mkdir(parents=True)
    unit.rename(aside)
    unit.mkdir()
    for path in aside.iterdir():
        shutil.copyfile(path, unit / path.name)


def without_rows(unit: Path) -> None:
    (unit.parents[1] / "09-evaluate/base/predictions.jsonl").write_text("")


def left_over(unit: Path) -> None:
    (unit / ".tmpAbCdEf").write_text("")


@pytest.mark.parametrize(
    "grade, acts",
    [
        ("good", [(Done(0, "", ""), nothing)]),
        ("silent", [(Done(0, "", ""), other_bytes)]),
        ("silent", [(Done(0, "", ""), remade)]),
        ("silent", [(CLEAR, remade)]),
        ("silent", [(CLEAR, without_rows)]),
        ("unclear", [(Done(0, "", ""), left_over)]),
        ("unclear", [(TRACEBACK, nothing)]),
        ("unclear", [(Done(0, "", TRACEBACK.err), nothing)]),
        ("unclear", [(Done(2, "", CLEAR.err * 2), nothing)]),
        ("unclear", [(Done(2, "", "a library's word\n" * 9 + CLEAR.err), nothing)]),
        ("unclear", [(Done(2, "", ""), nothing)]),
        ("unclear", [(Done(None, "", ""), nothing)]),
        ("unclear", [(CLEAR, nothing)]),
        ("good", [(RERUN_NAMED, nothing), (Done(0, "", ""), moved_aside)]),
        ("silent", [(RERUN_NAMED, nothing), (Done(0, "", ""), remade)]),
        ("silent", [(RERUN_NAMED, nothing), (Done(0, "", ""), other_bytes)]),
        ("unclear", [(RERUN_NAMED, nothing), (CLEAR, nothing)]),
    ],
)
def test_what_a_program_does_is_judged(lab, grade, acts):
    program(lab, *acts)
    assert lab.resumes("run").grade == grade


@pytest.mark.parametrize("done, grade", [(Done(0, "", ""), "silent"), (CLEAR, "good"), (TRACEBACK, "unclear")])
def test_what_should_be_refused(lab, done, grade):
    program(lab, (done, nothing))
    assert lab.refused("run").grade == grade


def test_a_mended_fault_must_lead_on(lab):
    program(lab, (CLEAR, other_bytes), (Done(0, "", ""), nothing))
    lab.damaged.add(lab.run / LEARN / "delta.safetensors")
    whole = lab.run / LEARN / "delta.safetensors"
    assert lab.resumes("run", mend=lambda: whole.write_text("values")).grade == "good"
    program(lab, (CLEAR, nothing), (TRACEBACK, nothing))
    assert lab.resumes("run", mend=lambda: None).grade == "unclear"


# ---- what a loss of power could take


@pytest.mark.parametrize(
    "operations, lost",
    [
        ("write .f.partial/f, fsync .f.partial/f, rename .f.partial/f f, fsync .", ""),
        ("write .f.partial/f, rename .f.partial/f f, fsync .", ".f.partial/f"),
        ("write .f.partial/f, fsync .f.partial/f, rename .f.partial/f f", "."),
        (
            "write f.partial/tmp, rename f.partial/tmp f.partial/f, fsync f.partial/f, rename f.partial/f f, fsync .",
            "",
        ),
        ("mkdir u, write u/rows, rename u/M.partial/m u/MANIFEST.json, fsync u, fsync .", ". u/rows"),
        ("mkdir u, fsync ., write u/rows, fsync u/rows, rename u/M.partial/m u/MANIFEST.json, fsync u", ""),
        ("mkdir u, fsync ., write u/rows, unlink u/rows, rename u/M.partial/m u/MANIFEST.json, fsync u", ""),
    ],
)
def test_what_is_not_flushed(operations, lost):
    made = [Operation(n, *(words.split() + [""])[:3]) for n, words in enumerate(operations.split(", "))]
    assert " ".join(unflushed(made)) == lost


# ---- the injector, on a program that writes a file as it should be written


def write_file(folder: Path) -> None:
    """Six operations, of which the third is a write."""
    os.mkdir(folder / "new")
    file = os.open(folder / "new/file.partial", os.O_WRONLY | os.O_CREAT)
    os.write(file, b"12345678")
    os.fsync(file)
    os.rename(folder / "new/file.partial", folder / "new/file")
    os.close(file)
    with open(folder / "new/file", "rb") as whole:  # not one of them
        whole.read()
    os.unlink(folder / "new/file")


def with_fault(folder: Path, kind: str, at: int, match: str = "") -> int:
    """Its exit code; of an OSError the error's number."""
    pid = os.fork()
    if not pid:
        try:
            fault(kind, at, folder, match, folder.parent / "operations")()
            write_file(folder)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno)
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(library() is None, reason=reason)
@pytest.mark.parametrize(
    "kind, at, code, left",
    [
        ("count", 0, 0, {"new": None}),
        ("kill", 1, -signal.SIGKILL, {}),
        ("kill", 3, -signal.SIGKILL, {"new": None, "new/file.partial": b""}),
        ("half", 3, -signal.SIGKILL, {"new": None, "new/file.partial": b"1234"}),
        ("half", 5, -signal.SIGKILL, {"new": None, "new/file": b"12345678"}),
        ("full", 2, 28, {"new": None}),
        ("full", 3, 28, {"new": None, "new/file.partial": b""}),
        ("full", 4, 0, {"new": None}),
        ("eio", 4, 5, {"new": None, "new/file.partial": b"12345678"}),
        ("kill", 7, 0, {"new": None}),
    ],
)
def test_a_fault_strikes_at_its_operation(tmp_path, kind, at, code, left):
    folder = tmp_path / "below"
    folder.mkdir()
    assert with_fault(folder, kind, at) == code
    paths = sorted(folder.rglob("*"))
    found = {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}
    assert found == left
    made = [operation.name for operation in operations(tmp_path / "operations")]
    assert made == ["mkdir", "open", "write", "fsync", "rename", "unlink"][: len(made)]


@pytest.mark.skipif(library() is None, reason=reason)
def test_what_is_elsewhere_is_left_alone(tmp_path):
    folder = tmp_path / "below"
    folder.mkdir()
    assert with_fault(folder, "kill", 1, match="other") == 0
    (folder / "new").rmdir()
    assert with_fault(folder, "deny", 0, match="file.partial") == 13


def test_every_drill_has_a_name_of_its_own():
    names = [drill.name for drill in every()]
    assert len(set(names)) == len(names) and FAST <= {drill.title for drill in every()}
