"""Comparisons: what a file stands for, which runs share what, and what is said of the results."""

import json
import math
import re
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from allo_fast.__main__ import main
from allo_fast.compare import driving, results
from allo_fast.compare.arms import Comparison, _overlap
from allo_fast.compare.driving import Clock, Worker, compare
from allo_fast.compare.results import Difference, Result, edges, sentences, table, ties
from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.data.intervals import accuracy_interval, difference_interval, spread, student
from allo_fast.runs.lock import alone_in
from tests.conftest import MICRO

runs = pytest.mark.xdist_group("runs")

FILE = """
job: micro.yaml
set: {name: compared, rewards.source: confidence, locate: {score: random}}
development: arithmetic:train[2000:2003]
against: [base, dpo]
arms:
  dpo: {method: dpo, warmup.learning_rate: {best: [1e-4, 1e-2]}, locate.score: null}
  sparse: {method: sparse-dpo, learn.ratio: {each: [0.1, 0.2]}, rewards.source: null}
  allo: {}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "micro.yaml").write_text(
        MICRO.format(folder=tmp_path).replace("locate: {score: delta, windows: 32}\n", "")
    )
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
    assert not any(trial.config.evaluate.samples for trial in tried)
    numbers = [(trial.config.warmup.learning_rate, trial.config.warmup.beta) for trial in tried]
    assert numbers == [(1e-4, 0.1), (1e-4, 0.5), (1e-2, 0.1), (1e-2, 0.5)]
    assert {(*t.config.seeds, t.config.data.test) for t in tried} == {(7, "arithmetic:train[2000:2003]")}
    final = comparison.final(dpo, tried[3].values).config
    assert (final.seeds, final.data.test, final.warmup.beta) == ([4, 5, 6], "arithmetic:test[:9]", 0.5)
    assert comparison.development(second) == []
    ratios = [comparison.final(arm, {}).config.learn.ratio for arm in (first, second)]
    assert ratios == [0.1, 0.2] and comparison.final(allo, {}).config.rivals == []
    folders = {
        trial.folder for trial in [*tried, *(comparison.final(arm, arm.candidates[0]) for arm in comparison.arms)]
    }
    assert len(folders) == 8 and all(folder.parent.parent == file.parent / "compared" for folder in folders)


def test_what_suits_the_machine_is_said_once(file, caplog):
    micro = file.parent / "micro.yaml"
    micro.write_text(micro.read_text().replace("dtype: float32", "dtype: auto"))
    caplog.set_level("INFO")
    comparison = Comparison.load(file, [])
    configs = [comparison.final(arm, arm.candidates[0]).config for arm in comparison.arms]
    assert caplog.text.count("as suits this machine") == 1
    assert {config.model.dtype for config in configs} == {comparison.dtype}


@pytest.mark.parametrize("path", sorted(Path("configs/compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_comparisons_fit(path):
    comparison = Comparison.load(path, [])
    trials = [trial for arm in comparison.arms for trial in comparison.development(arm)]
    assert len(trials) > len(comparison.arms) or not any("{best:" in line for line in path.read_text().splitlines())
    for arm in comparison.arms:
        assert comparison.final(arm, arm.candidates[-1]).config.data.test == comparison.final(arm, {}).config.data.test


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
        ("[1e-4, 1e-2]", "[1e-4, 1.0e-4]", "arms.dpo: `best` has {'warmup.learning_rate': 0.0001} twice"),
        ("{best: [1e-4, 1e-2]}", "1e-4", "development: no arm has `best` values to choose"),
        ("development: arithmetic:train[2000:2003]\n", "", "development: on which data are the `best` values chosen"),
        ("  allo: {}", "  base: {}", "arms.base: that is what the model is called before it is trained"),
        ("against: [base, dpo]\narms:", "arms:\n  base: {}", "arms.base: that is what"),
        ("  allo: {}", "  'sparse, 0.1': {}", "arms: each needs a name of its own, got 'sparse, 0.1'"),
        ("  allo: {}", "  ' ': {}", "arms: each needs a name of its own, got ' '"),
        ("  allo: {}", "  allo: {data.test: x}", "arms.allo: data.test is of all arms alike; move it to `set`"),
        ("  allo: {}", "  allo: {evaluate: {top_p: 0.5}}", "arms.allo: evaluate.top_p is of all arms alike"),
        ("  allo: {}", "  allo: {sample.stop: []}", "arms.allo: sample.stop is of all arms alike"),
        (
            "{each: [0.1, 0.2]}",
            "{each: [0.1], best: [0.2, 0.3]}",
            "arms.sparse.learn.ratio.each: `best` of the same key",
        ),
        (
            "train[2000:2003]",
            "test[7:9]",
            r"development: arithmetic:test\[7:9\] shares rows with data.test, arithmetic:te",
        ),
        ("train[2000:2003]", "train[1005:2003]", r"shares rows with data.train, arithmetic:train\[1000:1006\]"),
        ("set: {", "set: {data.test: null, ", "data.test: a comparison needs one beside data.train; .* names none"),
        ("job: micro.yaml", "job: nowhere.yaml", "nowhere.yaml: no such file"),
        ("against:", "metric: rewards/accuracies\nagainst:", "metric: of data.format: preference; .* has problems"),
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


def test_names_make_folders_of_their_own(file):
    names = ["a b", "a-b", "a|b", "..", "cache", "compare.md", "ratio.svg", "x" * 300, "\u00e4"]
    arms = "\n".join(f"  {json.dumps(name, ensure_ascii=False)}: {{}}" for name in names)
    comparison = Comparison.load(changed(file, ("  allo: {}", arms)), [])
    folders = [comparison.final(arm, arm.candidates[0]).folder for arm in comparison.arms if arm.name in names]
    assert len({*folders}) == len(names)
    assert all(folder.parent.parent == comparison.folder for folder in folders)
    assert not any(folder.parent.name.startswith(("cache", "compare", ".")) for folder in folders)


def test_empty_sections_are_settings(file):
    changed(file, ("  allo: {}", "  tuned: {sft: {}}\n  lora: {method: dpo, warmup.lora: {}, locate.score: null}"))
    comparison = Comparison.load(file, [])
    configs = {arm.name: comparison.final(arm, arm.candidates[0]).config for arm in comparison.arms}
    assert configs["tuned"].sft is not None and configs["lora"].warmup.lora.r == 16
    assert configs["dpo"].sft is configs["dpo"].warmup.lora is None


def drive(units: list[str]):
    def show(label, progress):
        units.append(label)
        return list(progress)

    return show


@runs
def test_what_arms_share_is_made_once_and_nothing_twice(file):
    made: list[str] = []
    lines = list(compare(Comparison.load(file, []), drive(made)))
    folder = file.parent / "compared"
    stages = [label.rpartition(": ")[2] for label in made]
    expected = ["pretrain base", "evaluate base"]
    for stage in (*(f"{stage} seed-{seed}" for stage in ("sample", "pairs") for seed in range(3)), *expected):
        assert stages.count(stage) == 1 + (stage == "evaluate base"), "the base on development data, too"
    assert [stages.count(f"warmup seed-{seed}") for seed in range(3)] == [1, 1, 2], "another seed chooses"
    pairs = {path.stat().st_ino for path in folder.glob("*/*/03-pairs/seed-0/pairs.jsonl")}
    assert len(pairs) == 1 and [*folder.glob("cache/reference-*")] and not [*folder.glob("*/*/cache")]
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
def test_what_another_command_made_counts_for_the_time(file):
    changed(file, ("{best: [1e-4, 1e-2]}", "1e-4"), ("development: ", "# "))
    one, both = (Comparison.load(file, [f"seeds={seeds}"]) for seeds in ([0], [0, 1]))
    first, second = (one.final(arm, {}) for arm in one.arms[1:3])
    assert [*Worker(one, drive([]), False, Clock([])).complete(deque([first]))] == [first]
    clock = Clock([both.final(both.arms[3], {})])
    assert [*Worker(one, drive([]), False, clock).complete(deque([second]))] == [second]
    assert clock.left.endswith("one process left beside forget, rewards")


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
def test_no_arm_waits_for_another_to_choose(file, monkeypatch):
    changed(file, ("{each: [0.1, 0.2]}", "{best: [0.1, 0.2]}"))
    monkeypatch.setattr(driving, "_SECONDS", 0.01)
    comparison = Comparison.load(file, ["seeds=[0]"])
    other = comparison.development(comparison.arms[0])[1]
    lines = compare(comparison, drive([]))
    next(lines)
    with alone_in(other.folder):  # as another command would be, at one of those that dpo chooses from
        said = [next(lines).partition(":")[0] for _ in range(5)]
    first, *of_sparse, allo, final = said
    assert [first, allo] == ["dpo, warmup.learning_rate 0.0001", "allo"]
    assert of_sparse == ["sparse, learn.ratio 0.1", "sparse, learn.ratio 0.2"] and final in of_sparse
    last = [next(lines).partition(":")[0] for _ in range(2)]
    assert last[0] == other.label and last[1] in (other.label, first)


@runs
def test_a_candidate_that_does_not_train_ends_nothing_else(file):
    changed(file, ("{best: [1e-4, 1e-2]}", "{best: [1e30, 1e-4]}"), ("{each: [0.1, 0.2]}", "0.1"))
    changed(
        file, ("  allo: {}", "  lost: {method: dpo, warmup.learning_rate: {best: [1e30, 1e31]}, locate.score: null}")
    )
    lines = list(compare(Comparison.load(file, ["seeds=[0]"]), drive([])))
    assert any(line.startswith("dpo, warmup.learning_rate 1e+30: not trained: step ") for line in lines)
    assert "lost: left out, as no candidate could be trained" in lines
    rows = json.loads((file.parent / "compared/compare.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["base", "dpo", "sparse"]
    assert rows[1]["chosen"] == {"warmup.learning_rate": 1e-4} and rows[1]["tried"][0][0] is None
    assert [line for line in lines if " on data.test" in line][-1].endswith("% on data.test"), "no time is left then"
    # A candidate more, which may be the best, and other test data.
    changed(file, ("[1e30, 1e-4]", "[1e-4, 1e-3]"))
    list(compare(Comparison.load(file, ["seeds=[0]"]), drive([])))
    with pytest.raises(
        UserError, match="holds another run: data.test .*; `allo-fast compare FILE --rerun` makes it anew"
    ):
        list(compare(Comparison.load(file, ["seeds=[0]", "data.test=arithmetic:test[:5]"]), drive([])))
    list(compare(Comparison.load(file, ["seeds=[0]", "data.test=arithmetic:test[:5]"]), drive([]), rerun=True))
    old = [path.parts[-6] for path in (file.parent / "compared").glob("*/final*/old-1/09-evaluate/base/MANIFEST.json")]
    assert sorted(old) == ["dpo", "sparse"], "what does not fit is kept in each arm"


@runs
def test_preferences_are_compared_by_log_probabilities(file):
    rows = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n + 2)} for n in range(6)]
    (data := file.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["pretrain", str(file.parent / "micro.yaml")]) == 0
    changed(file, ("{best: [1e-4, 1e-2]}", "1e-3"), ("{each: [0.1, 0.2]}", "0.1"), ("development: ", "# "))
    model = file.parent / "micro/00-pretrain/base/model"
    changed(
        file, ("name: compared", f"name: compared, seeds: [0], data.format: preference, model.name_or_path: {model}")
    )
    words = [f"data.train={data}[:3]", f"data.test={data}[3:]", "forget.threshold=1"]
    lines = list(compare(Comparison.load(file, words), drive([])))
    assert any(line.startswith("dpo: ") and " base " in line for line in lines)
    report = json.loads((file.parent / "compared/compare.json").read_text())
    assert report["metric"] == "logps/accuracies" and set(report["rows"][1]["minus"]) == {"base"}
    changed(file, ("job: ", "metric: rewards/accuracies\njob: "))
    list(compare(Comparison.load(file, words), pytest.fail))
    report = json.loads((file.parent / "compared/compare.json").read_text())
    base, dpo, *_ = report["rows"]
    assert report["metric"] == "rewards/accuracies" and (base["accuracy"], base["interval"]) == (0.5, [0.5, 0.5])
    assert dpo["minus"]["base"]["points"] == pytest.approx(dpo["accuracy"] - 0.5)


def test_a_file_is_the_same_by_any_name():
    assert _overlap("./a/../pairs.jsonl[1:3]", "pairs.jsonl") and not _overlap("pairs.jsonl[1:3]", "pairs.jsonl[3:]")


@runs
def test_what_makes_a_comparison_less_than_fair_is_said(file, monkeypatch):
    read = results._predictions

    def predictions(run, key):
        rows = [[*each] for each in read(run, key)]
        if key == "base" and run.folder.parent.name == "other":
            rows[0][0] = {**rows[0][0], "strict": True}
        return rows

    monkeypatch.setattr(results, "_predictions", predictions)
    changed(file, ("{best: [1e-4, 1e-2]}", "{best: [1e30, 1e-4]}"), ("{each: [0.1, 0.2]}", "0.1"))
    others = "  other: {method: dpo, pretrain.problems: 16}\n  lost: {method: dpo, warmup.learning_rate: 1e30}"
    others += "\n  'dpo, warmup.learning_rate 1e+30': {method: dpo}"
    changed(file, ("  allo: {}", others), ("development:", "development_seeds: [0]\ndevelopment:"))
    lines = list(compare(Comparison.load(file, ["seeds=[0]"]), drive([])))
    folder = file.parent / "compared"
    report = json.loads((folder / "compare.json").read_text())
    lost, other, seed = report["notes"]
    assert (
        re.fullmatch(r"lost: left out: not trained: step \d+: .*", lost)
        and f"\n\n{lost}\n\n" in (folder / "compare.md").read_text()
    )
    assert other.startswith("other begins from another base, of ") and seed.startswith("Seed 0 chose, too")
    assert [row["name"] for row in report["rows"]] == [
        "base",
        "dpo",
        "sparse",
        "other",
        "dpo, warmup.learning_rate 1e+30",
    ]
    assert any(line.startswith("lost: not trained: step ") for line in lines)
    assert "of 12.5%, which" in other, "one of eight"
    row = report["rows"][3]
    assert row["minus"]["base"]["points"] == pytest.approx(row["accuracy"] - 1 / 8)


@runs
def test_damaged_units_are_not_shared(file):
    changed(file, ("{best: [1e-4, 1e-2]}", "1e-4"), ("development: arithmetic:train[2000:2003]\n", ""))
    made: list[str] = []
    work = compare(Comparison.load(file, ["seeds=[0]"]), drive(made))
    while not next(work).startswith("dpo: "):
        pass
    (path,) = file.parent.glob("compared/dpo/final*/03-pairs/seed-0/pairs.jsonl")
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
    clock = Clock(trials[:4])
    clock.drop(trials[3])
    assert len(clock.waiting) == 6 + 3 + 3, "what others share with it stays"


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_problems", "of_both", "low", "high"),
    [
        (1, 0, 1, 0, 0.92, 0.975),
        (2, 0, 1, 0.3, 0.92, 0.975),
        (2, 1, 0.1, 0.1, 0.92, 0.975),
        (3, 0.3, 1, 0.3, 0.92, 0.975),
        (5, 0.5, 0.1, 1, 0.92, 0.975),
        (5, 0.3, 1, 0.3, 0.92, 0.975),
        (5, 0, 1, 1, 0.92, 0.975),
        (5, 0, 0, 1, 0.92, 1),
        (2, 0.3, 1, 0.3, 0.87, 0.93),  # Satterthwaite's degrees are too many of two seeds that matter as problems do
    ],
)
def test_intervals_hold_the_mean_nineteen_times_of_twenty(seeds, of_seeds, of_problems, of_both, low, high):
    draw, held, runs = np.random.default_rng(3), 0, 600
    for _ in range(runs):
        parts = draw.normal(0, of_seeds, (seeds, 1)), draw.normal(0, of_problems, (1, 60))
        mean, variance, t = spread(sum(parts) + draw.normal(0, of_both, (seeds, 60)))
        held += abs(mean) <= t * variance**0.5
    assert low < held / runs < high


def test_an_interval_by_hand():
    """Of four problems by two seeds: MS of seeds 2, of problems 1, of the rest 1/3; t of 2.5 ** 2 / ... degrees."""
    values = np.array([[1.0, 2, 3, 3], [0.0, 2, 1, 2]])
    mean, variance, t = spread(values)
    by_seed = 4 * np.var([2.25, 1.25], ddof=1)
    by_problem, rest = 2 * np.var([0.5, 2, 2, 2.5], ddof=1), ((values - [0.5, 2, 2, 2.5]) ** 2).sum() - 8 * 0.25
    total = by_seed + by_problem - rest / 3
    degrees = total**2 / (by_seed**2 / 1 + by_problem**2 / 3 + (rest / 3) ** 2 / 3)
    assert mean == 1.75 and (variance, t) == pytest.approx((total / 8, student(degrees)))
    quantiles = [student(n) for n in (1, 2, 4, 30, math.inf)]
    assert quantiles == pytest.approx([12.7062, 4.3027, 2.7764, 2.0423, 1.96], rel=2e-4)  # from tables


def test_differences_are_paired_and_few_wins_prove_nothing():
    draw = np.random.default_rng(1)
    worse = draw.random((5, 400)) < np.linspace(0.1, 0.9, 400)
    better = worse | (draw.random((5, 400)) < 0.05)
    clear = Difference(*difference_interval(better, worse))
    assert clear.points == pytest.approx((better ^ worse).mean()) and clear.verdict == "clear of zero"
    assert clear.interval[1] - clear.interval[0] < accuracy_interval(better)[1][1] - accuracy_interval(better)[1][0]
    assert Difference(*difference_interval(worse, worse[:1])).verdict == "inside the noise"
    few = np.zeros((1, 500))
    few[0, :4] = 1
    assert Difference(*difference_interval(few, 0 * few)).verdict == "inside the noise", "McNemar's p is .125"


def test_an_accuracy_is_as_uncertain_as_its_seeds_differ():
    draw, held, runs = np.random.default_rng(5), 0, 500
    for _ in range(runs):
        share = np.clip(draw.normal(0.4, 0.05, (3, 1)), 0, 1)
        mean, (low, high) = accuracy_interval(draw.random((3, 500)) < share)
        held += low <= 0.4 <= high
    assert 0.92 < held / runs < 0.975


def test_a_choice_at_the_end_of_what_was_tried_is_marked():
    tried = [(0.1, {"a": 1e-5, "b": True}), (0.3, {"a": 3e-5, "b": True}), (0.2, {"a": 1e-4, "b": True})]
    assert edges({"a": 3e-5, "b": True}, tried) == []
    assert edges({"a": 1e-4, "b": True}, tried) == ["a"] == edges({"a": 1e-5, "b": True}, tried)
    assert edges({"a": 1e-4}, tried[2:]) == [], "nothing else was tried"
    tied = [*tried, (0.3, {"a": 3e-5, "b": False})]
    assert ties({"a": 3e-5, "b": True}, tried) == [] and ties({"a": 3e-5, "b": True}, tied) == ["b"]
    assert edges({"a": 64}, [(0.1, {"a": 64}), (0.2, {"a": None}), (0.3, {"a": "auto"})]) == []


def test_what_is_said_of_each_difference():
    above, level = Difference(1.0, (0.9, 1.0)), Difference(0.0, (-0.02, 0.02))
    base = Result("base", 0, (0, 0.1), [0, 0], {"dpo": Difference(-1.0, (-1.0, -0.9))})
    dpo = Result("dpo", 1, (0.9, 1), [1, 1], {"base": above}, states=16.0, seconds=3, ratio=1.0)
    allo = Result("a|b", 1, (0.9, 1), [1, 1], {"base": above, "dpo": level}, states=5.31, seconds=7, ratio=0.1)
    allo = replace(allo, chosen={"learn.learning_rate": 1e-4}, edges=["learn.learning_rate"])
    assert sentences([base, dpo, allo]) == [
        "dpo: 100.0% above base (+90.0% .. +100.0%), clear of zero",
        "a|b: 100.0% above base (+90.0% .. +100.0%), clear of zero",
        "a|b: 0.0% level with dpo (-2.0% .. +2.0%), inside the noise",
    ]
    *_, last = table([base, dpo, allo], "accuracy").splitlines()
    assert last == (
        "| a/b | 100.0% | 90.0% .. 100.0% | +100.0% (+90.0% .. +100.0%) | +0.0% (-2.0% .. +2.0%) ~ "
        "| learn.learning_rate 0.0001 [1] | 5.31 | 7 |"
    )


def test_a_comparison_is_not_a_job(file):
    with pytest.raises(UserError, match="compare.yaml: a comparison; `allo-fast compare .*compare.yaml` runs it"):
        load_config(file)
