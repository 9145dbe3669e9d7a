"""`allo-fast status`: of a run that is done, begun, and not even that."""

import json
import shutil

import pytest

from allo_fast.__main__ import main
from allo_fast.durable import read_json, write_json
from allo_fast.overview import State, clock, lines, overview
from allo_fast.runs.home import MANIFEST, STARTED
from allo_fast.runs.run import Run
from allo_fast.stages import STAGES

pytestmark = pytest.mark.xdist_group("runs")  # one finished run for all


def test_a_run_that_is_done(finished, capsys):
    config, folder = finished
    assert main(["status", str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    manifests = [*folder.rglob(MANIFEST)]
    assert said[-1] == f"{len(manifests)} of {len(manifests)} done" == f"{len(said) - 1} of {len(said) - 1} done"
    seconds = read_json(folder / "08-learn/seed-0" / MANIFEST)["seconds"]
    (learn,) = (line.split() for line in said if line.startswith("08-learn seed-0"))
    assert learn == ["08-learn", "seed-0", "done", *clock(seconds).split()]
    assert main(["status", str(config)]) == 0 and capsys.readouterr().out.splitlines() == said, "by its config, too"


def test_what_was_begun_and_what_is_to_come(copied):
    config, folder = copied
    for seed, name in ((0, "07-forget"), (1, "07-forget"), (1, "08-learn"), (1, "09-evaluate")):
        shutil.rmtree(folder / name / f"{'allo-' * (name == '09-evaluate')}seed-{seed}")
    begun, waits = folder / "07-forget/seed-0", folder / "07-forget/seed-1"
    for place in (begun, waits):
        place.mkdir()
        write_json(place / STARTED, {})
    rows = [{"step": n, "total_steps": 9, "seconds": s} for n, s in ((1, 50.0), (2, 2.0), (3, 3.0))]
    (begun / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "tot')
    (waits / "metrics.jsonl").write_bytes(b"\x00\xff\n")
    (folder / "06-rewards/seed-1" / MANIFEST).write_text("{}")
    states = {state.name: state for state in overview(Run.read(folder, STAGES))}
    assert states["07-forget seed-0"] == State("07-forget seed-0", "begun", 55.0, 18.0, "step 3 of 9"), (
        "the median of 3 s"
    )
    assert states["07-forget seed-1"] == State("07-forget seed-1", "begun"), "no other seed's is done either"
    assert states["06-rewards seed-1"].state == "damaged"
    other = read_json(folder / "08-learn/seed-0" / MANIFEST)["seconds"]
    assert states["08-learn seed-1"] == State("08-learn seed-1", "to come", left=other)
    assert states["08-learn seed-0"].left == 0.0 and states["09-evaluate allo-seed-1"].state == "to come"


def test_nothing_is_left_of_asking(tmp_path, capsys):
    assert main(["status", "configs/quickstart.yaml", f"output_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"0 of {len(said) - 1} done; of {len(said) - 1} nothing is known yet" and not any(
        tmp_path.iterdir()
    )
    assert main(["status", "configs/quickstart.yaml", f"output_dir={tmp_path}", "rounds=2", "seeds=[0]"]) == 0
    later = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("quickstart-round-2-seed-0 08-learn")
    ]
    assert len(later) == 1 and "to come" in later[0]
    assert main(["status", str(tmp_path), "seeds=[0]"]) == 2 and "is a folder, which has its" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    assert main(["status", str(tmp_path / "a")]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


def test_as_text():
    states = [State("a", "done", 61.0, 0.0), State("b", "begun", 5.0, 7200.0, "step 1 of 9"), State("c", "to come")]
    assert [line.split() for line in lines(states)] == [
        ["a", "done", "1", "min"],
        ["b", "begun", "step", "1", "of", "9", "5", "s", "2", "h", "00", "min", "left"],
        ["c", "to", "come"],
        "1 of 3 done; about 2 h 00 min left; of 1 nothing is known yet".split(),
    ]
    assert [clock(s) for s in (0.2, 59.4, 60, 3599, 3660)] == ["0 s", "59 s", "1 min", "1 h 00 min", "1 h 01 min"]
