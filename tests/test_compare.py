"""Comparisons: what a file stands for, which runs share what, and what is said of the results."""

import json
from pathlib import Path

import numpy as np
import pytest

from allo_fast.__main__ import main
from allo_fast.compare import driving
from allo_fast.compare.arms import Comparison
from allo_fast.compare.driving import Clock, compare
from allo_fast.compare.results import Result, difference, edges, interval, sentences, table
from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.data.scoring import difference_interval
from allo_fast.runs.lock import alone_in
from tests.conftest import MICRO

runs = pytest.mark.xdist_group("runs")

FILE = """
job: micro.yaml
set: {name: compared, rewards.source: confidence, locate: {score: random}}
development: arithmetic:train[2000:2003]
development_seeds: 1
against: [base, dpo]
arms:
  dpo: {method: dpo, warmup.learning_rate: {best: [1e-4, 1e-2]}, locate.score: null}
  sparse: {method: sparse-dpo, learn.ratio: {each: [0.1, 0.2]}, rewards.source: null}
  allo: {}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "micro.yaml").write_text(MICRO.format(folder=tmp_path).replace("locate: {score: delta}\n", ""))
    (path := tmp_path / "compare.yaml").write_text(FILE)
    return path


def changed(file: Path, *pairs: tuple[str, str]) -> Path:
    text = file.read_text()
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text)
    return file


def test_each_makes_arms_and_best_candidates(file):
    changed(file, ("{best: [1e-4, 1e-2]}", "{best: [1e-4, 1e-2]}, warmup.beta: {best: [0.1, 0.5]}"))
    comparison = Comparison.load(file, ["seeds=[4,5,6]", "data.test=arithmetic:test[:9]"])
    dpo, first, second, allo = comparison.arms
    assert [arm.name for arm in comparison.arms] == ["dpo", "sparse, 0.1", "sparse, 0.2", "allo"]
    tried = comparison.development(dpo)
    numbers = [(trial.config.warmup.learning_rate, trial.config.warmup.beta) for trial in tried]
    assert numbers == [(1e-4, 0.1), (1e-4, 0.5), (1e-2, 0.1), (1e-2, 0.5)]
    assert {(*t.config.seeds, t.config.data.test) for t in tried} == {(4, "arithmetic:train[2000:2003]")}
    final = comparison.final(dpo, tried[3].values).config
    assert (final.seeds, final.data.test, final.warmup.beta) == ([4, 5, 6], "arithmetic:test[:9]", 0.5)
    assert comparison.development(second) == []
    ratios = [comparison.final(arm, {}).config.learn.ratio for arm in (first, second)]
    assert ratios == [0.1, 0.2] and comparison.final(allo, {}).config.rivals == []
    folders = {
        trial.folder for trial in [*tried, *(comparison.final(arm, arm.candidates[0]) for arm in comparison.arms)]
    }
    assert len(folders) == 8 and all(folder.parent.parent == file.parent / "compared" for folder in folders)


def test_the_file_names_the_folder_where_nothing_else_does(file):
    changed(file, ("name: compared, ", ""))
    assert Comparison.load(file, []).folder.name == "compare"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("against:", "againts:", r"compare.yaml: againts: unknown key; did you mean against\?"),
        ("[base, dpo]", "[base, sparse]", "against: no arm is called sparse; there are base, dpo, sparse, 0.1"),
        ("{best: [1e-4, 1e-2]}", "{best: 1e-4}", "arms.dpo.warmup.learning_rate.best: expected a list of values, got"),
        ("{best: [1e-4, 1e-2]}", "{best: []}", "arms.dpo.warmup.learning_rate.best: expected a list of values, got"),
        ("{best: [1e-4, 1e-2]}", "1e-4", "development: no arm has `best` values to choose"),
        ("development: arithmetic:train[2000:2003]\n", "", "development: on which data are the `best` values chosen"),
        ("  allo: {}", "  base: {}", "arms.base: that is what the model is called before it is trained"),
        ("job: micro.yaml", "job: nowhere.yaml", "nowhere.yaml: no such file"),
        (
            "locate: {score: random}",
            "locate: {scores: random}",
            "locate.scores: unknown key; did you mean locate.score",
        ),
        ("name: compared", "name: compared, deepspeed: auto", "deepspeed: a comparison's runs are one process each"),
    ],
)
def test_a_file_that_does_not_fit(file, old, new, said):
    with pytest.raises(UserError, match=said):
        Comparison.load(changed(file, (old, new)), [])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  allo: {}", "  allo: {learn.rate: 1}", "arms: allo: .*micro.yaml: learn.rate: unknown key"),
        ("  allo: {}", "  allo: {rewards.ratio: 0.2}", r"arms: allo: rewards.ratio is not read: rewards.source: conf"),
        (
            "learn.ratio: {each: [0.1, 0.2]}",
            "forget.ratio: {each: [0.1, 0.2]}",
            r"arms: sparse, 0.1: forget.ratio is no",
        ),
        (
            "warmup.learning_rate: {best: [1e-4, 1e-2]}",
            "learn.ratio: {best: [0.1, 0.2]}",
            "arms: dpo: learn.ratio is not",
        ),
        ("  allo: {}", "  allo: {learn.reference: nowhere}", "arms: allo: 1 problem before any stage starts"),
    ],
)
def test_what_would_end_an_arm_later_is_said_first(file, old, new, said):
    with pytest.raises(UserError, match=said):
        list(compare(Comparison.load(changed(file, (old, new)), []), pytest.fail))


def drive(units: list[str]):
    def show(label, progress):
        units.append(label)
        return list(progress)

    return show


@runs
def test_what_arms_share_is_made_once_and_nothing_twice(file, monkeypatch):
    made: list[str] = []
    lines = list(compare(Comparison.load(file, []), drive(made)))
    folder = file.parent / "compared"
    stages = [label.rpartition(": ")[2] for label in made]
    expected = ["pretrain base", "evaluate base"]
    for stage in ("sample seed-0", "pairs seed-0", "sample seed-1", "pairs seed-1", *expected):
        assert stages.count(stage) == 1 + (stage == "evaluate base"), "the base on development data, too"
    assert stages.count("warmup seed-0") == 2 and stages.count("warmup seed-1") == 1, "the best was trained already"
    pairs = {path.stat().st_ino for path in folder.glob("*/*/03-pairs/seed-0/pairs.jsonl")}
    assert len(pairs) == 1 and len([*folder.glob("cache/*")]) == len({*folder.glob("cache/*")}) > 0
    assert not [*folder.glob("*/*/cache")]
    assert "4 arms, 6 runs" in lines[0] and "known when they have run once" in lines[0]
    assert any("minutes of one process left beside" in line for line in lines)
    report = json.loads((folder / "compare.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["base", "dpo", "sparse, 0.1", "sparse, 0.2", "allo"]
    dpo = report["rows"][1]
    best = max(accuracy for accuracy, _ in dpo["tried"])
    assert [best, dpo["chosen"]] in dpo["tried"] and (report["seeds"], report["problems"]) == (2, 8)
    states = [row["states"] for row in report["rows"][1:]]
    assert states[0] == 16 and states[1] < states[2] < states[0] and states[3] == states[1]
    text = (folder / "compare.md").read_text()
    assert "| sparse, 0.2 |" in text and "![](ratio.svg)" in text and "![](warmup.learning_rate.svg)" in text
    assert (folder / "ratio.svg").read_text().startswith("<svg")
    again = list(compare(Comparison.load(file, []), pytest.fail))
    assert "0 stages to go" in again[0] and again[1:][-9:] == lines[-9:]
    # An arm more costs what it alone needs.
    changed(file, ("  allo: {}", "  allo: {}\n  late: {forget.learning_rate: 1e-2}"))
    made.clear()
    list(compare(Comparison.load(file, []), drive(made)))
    stages = {label.rpartition(": ")[2].split()[0] for label in made}
    assert stages == {"forget", "learn", "evaluate"}


@runs
def test_a_run_that_another_command_works_on_comes_last(file, monkeypatch):
    changed(file, ("{best: [1e-4, 1e-2]}", "1e-4"), ("development: arithmetic:train[2000:2003]\n", ""))
    monkeypatch.setattr(driving, "_SECONDS", 0.01)
    comparison = Comparison.load(file, ["seeds=[0]"])
    first = comparison.final(comparison.arms[0], {})
    lines = compare(comparison, drive([]))
    with alone_in(first.folder):
        others = [next(lines) for _ in range(4)]
    assert [line.split(":")[0] for line in others[1:]] == ["sparse, 0.1", "sparse, 0.2", "allo"]
    assert next(lines).startswith("dpo: ")


@runs
def test_damaged_units_are_not_shared(file):
    changed(file, ("{best: [1e-4, 1e-2]}", "1e-4"), ("development: arithmetic:train[2000:2003]\n", ""))
    made: list[str] = []
    work = compare(Comparison.load(file, ["seeds=[0]"]), drive(made))
    while not next(work).startswith("dpo: "):
        pass
    path = file.parent / "compared/dpo/final/03-pairs/seed-0/pairs.jsonl"
    path.write_text(path.read_text() + "\n")
    list(work)
    assert sum(label.endswith("pairs seed-0") for label in made) == 2


@runs
def test_the_command_prints_and_continues(file, capsys):
    changed(file, ("{each: [0.1, 0.2]}", "0.1"), ("{best: [1e-4, 1e-2]}", "1e-4"), ("development: ", "# "))
    assert main(["compare", str(file), "seeds=[0]", "data.test=arithmetic:test[:4]"]) == 0
    out = capsys.readouterr().out
    assert "allo: " in out and "| dpo |" in out and out.rstrip().endswith("compare.md")
    assert main(["compare", str(file), "seeds=[0]", "data.test=arithmetic:test[:5]"]) == 2
    assert "holds another run: data.test" in capsys.readouterr().err
    assert main(["compare", str(file), "seeds=[0]", "data.test=arithmetic:test[:5]", "--rerun"]) == 0
    assert json.loads((file.parent / "compared/compare.json").read_text())["problems"] == 5


def test_the_clock_counts_shared_stages_once(file):
    comparison = Comparison.load(file, ["seeds=[0]"])
    trials = [comparison.final(arm, arm.candidates[0]) for arm in comparison.arms]
    # pretrain, sample, pairs, the base's evaluation; warm-up; locate and learn twice; allo's locate, ...; 4 evaluations
    assert [len(Clock(trials[:count]).waiting) for count in (1, 3, 4)] == [6, 6 + 3 + 3, 6 + 3 + 3 + 5]


def crossed(seeds: int, problems: int, of_seeds: float, of_problems: float) -> np.ndarray:
    draw = np.random.default_rng(3)
    parts = draw.normal(0, of_seeds, (seeds, 1)), draw.normal(0, of_problems, (1, problems))
    return sum(parts) + draw.normal(0, 0.1, (seeds, problems))


@pytest.mark.parametrize(("seeds", "of_seeds", "of_problems"), [(1, 0, 1), (2, 0, 1), (5, 0.3, 0.1), (8, 0.1, 1)])
def test_intervals_are_as_wide_as_the_variances_say(seeds, of_seeds, of_problems):
    values = crossed(seeds, 300, of_seeds, of_problems)
    low, high = interval(values)
    variance = values.mean(0).var(ddof=1) / 300 + (values.mean(1).var(ddof=1) / seeds if seeds > 1 else 0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.12)
    assert interval(values) == (low, high), "the same every time"


def test_differences_are_paired():
    draw = np.random.default_rng(1)
    worse = draw.random((5, 400)) < np.linspace(0.1, 0.9, 400)
    better = worse | (draw.random((5, 400)) < 0.05)
    found = difference(better.astype(float), worse.astype(float))
    points, ends = difference_interval(better.tolist(), worse.tolist())
    assert found.points == pytest.approx(points) and found.verdict == "clear of zero"
    assert found.interval == pytest.approx(ends, abs=0.006)
    assert difference(worse.astype(float), worse[:1].astype(float)).verdict == "inside the noise"


def test_a_choice_at_the_end_of_what_was_tried_is_marked():
    tried = [
        (0.1, {"a.rate": "1e-5", "b": True}),
        (0.3, {"a.rate": "3e-5", "b": True}),
        (0.2, {"a.rate": 1e-4, "b": True}),
    ]
    assert edges({"a.rate": "3e-5", "b": True}, tried) == []
    assert edges({"a.rate": 1e-4, "b": True}, tried) == ["a.rate"] == edges({"a.rate": "1e-5", "b": True}, tried)
    assert edges({"a.rate": 1e-4}, tried[2:]) == [], "nothing else was tried"


def test_what_is_said_of_each_difference():
    ones = np.ones((2, 50))
    minus = {"base": difference(ones, 0 * ones), "dpo": difference(ones, ones)}
    base = Result("base", 0, (0, 0), [0, 0], {"dpo": difference(0 * ones, ones)}, {}, [], [], None, None, None, {})
    allo = Result(
        "allo", 1, (1, 1), [1, 1], minus, {"learn.learning_rate": 1e-4}, [], ["learn.learning_rate"], 5.31, 7, 0.1, {}
    )
    assert sentences([base, allo]) == [
        "base: 100.0% below dpo (-100.0% .. -100.0%), clear of zero",
        "allo: 100.0% above base (+100.0% .. +100.0%), clear of zero",
        "allo: 0.0% level with dpo (+0.0% .. +0.0%), inside the noise",
    ]
    dpo = Result("dpo", 1, (1, 1), [1, 1], {}, {}, [], [], 16.0, 3, 1.0, {})
    *_, last = table([base, dpo, allo], "accuracy").splitlines()
    assert last == (
        "| allo | 100.0% | 100.0% .. 100.0% | +100.0% (+100.0% .. +100.0%) | +0.0% (+0.0% .. +0.0%) ~ "
        "| learn.learning_rate 0.0001 [1] | 5.31 | 7 |"
    )


def test_a_comparison_is_not_a_job(file):
    with pytest.raises(UserError, match="compare.yaml: a comparison; `allo-fast compare .*compare.yaml` runs it"):
        load_config(file)
