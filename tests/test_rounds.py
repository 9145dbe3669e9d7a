"""On-policy rounds: each begins from the model that the last one made."""

import json
from pathlib import Path

import pytest

from allo_fast.__main__ import main
from allo_fast.compare.arms import Comparison
from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.plan.job import disk_bytes
from allo_fast.runs.contents import sha256
from allo_fast.runs.rows import read_jsonl

WORDS = ["rivals=[]", "locate.score=random", "rewards.source=confidence"]


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize(("method", "seeds", "rounds"), [("allo", [0, 1], 2), ("dpo", [0], 3)])
def test_every_round_begins_from_the_model_of_the_one_before(copied, capsys, method, seeds, rounds):
    config, folder = copied
    words = [str(config), *WORDS, f"rounds={rounds}", f"seeds={seeds}", "name=several", f"method={method}"]
    words += ["warmup.learning_rate=1e-3"]
    assert main(["run", *words]) == 0
    out = capsys.readouterr().out
    base = folder.parent
    maker = "*-warmup" if method == "dpo" else "*-learn"
    for seed in seeds:
        before = base / "several"
        for number in range(2, rounds + 1):
            run = base / f"several-round-{number}-seed-{seed}"
            model = next(before.glob(f"{maker}/seed-{seed}/model/model.safetensors"))
            said = load_config(run / "config.yaml")
            assert said.model.name_or_path == str(model.parent) and said.seeds == [seed] and said.rounds == 1
            manifest = json.loads(next(run.glob(f"*-sample/seed-{seed}/MANIFEST.json")).read_text())
            assert sha256(model) in manifest["basis"].values()
            before = run
    rows = json.loads((base / "several" / "rounds.json").read_text())
    assert [row["round"] for row in rows] == [*range(1, rounds + 1)]
    right = [
        [row["strict"] for row in read_jsonl(next(run.glob(f"*-evaluate/{method}-seed-{seed}")) / "predictions.jsonl")]
        for seed in seeds
        for run in [base / f"several-round-{rounds}-seed-{seed}"]
    ]
    assert rows[-1]["accuracy"] == sum(map(sum, right)) / (8 * len(seeds))
    summary = json.loads((base / "several" / "summary.json").read_text())
    assert rows[0]["gain"] == summary["differences"][f"{method} - base"], "as the run's own summary has it"
    assert rows[1]["gain"]["points"] == pytest.approx(rows[1]["accuracy"] - rows[0]["accuracy"])
    assert "round 1: accuracy" in out and "since base" in out and f"since round {rounds - 1}" in out
    # The report says them again, as far as they are complete; complete, it computes nothing again.
    (base / "several" / "rounds.json").unlink()
    last = (
        next((base / f"several-round-{rounds}-seed-{seeds[-1]}").glob(f"*-evaluate/{method}-seed-*")) / "MANIFEST.json"
    )
    last.rename(last.with_name("hidden"))
    assert main(["report", *words]) == 0
    said = capsys.readouterr().out
    assert f"round {rounds}: " not in said and (rounds == 2 or f"round {rounds - 1}: " in said)
    last.with_name("hidden").rename(last)
    assert main(["report", *words]) == 0
    assert f"since round {rounds - 1}" in capsys.readouterr().out
    assert json.loads((base / "several" / "rounds.json").read_text()) == rows
    stamps = {path: path.stat().st_mtime_ns for path in base.rglob("MANIFEST.json")}
    assert main(["run", *words]) == 0
    assert {path: path.stat().st_mtime_ns for path in base.rglob("MANIFEST.json")} == stamps


@pytest.mark.xdist_group("runs")
def test_rounds_may_be_added_and_changed(copied, capsys):
    """To a run that saved no model; with other settings under --rerun, three rounds of which read each other."""
    words = ["run", str(copied[0]), *WORDS, "seeds=[0]", "name=more"]
    assert main([*words, "save_models=none"]) == 0
    summary = copied[1].parent / "more" / "summary.json"
    stamp = summary.stat().st_mtime_ns
    assert main([*words, "rounds=2"]) == 0
    assert not [*(copied[1].parent / "more").glob("old-*")] and summary.stat().st_mtime_ns > stamp
    assert (copied[1].parent / "more" / "rounds.json").exists()
    changed = [*words, "method=sparse-dpo", "forget.learning_rate=3e-3", "rounds=3", "--rerun"]
    assert main(changed) == 0 and "round 3: accuracy" in capsys.readouterr().out


def test_rounds_take_their_room_on_the_disk():
    one, three = (load_config("configs/quickstart.yaml", [f"rounds={n}", "sft=null"]) for n in (1, 3))
    assert 2 < disk_bytes(three, 10**9) / disk_bytes(one, 10**9) < 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.format=preference"], "rounds: data.format: preference has its responses"),
        (["save_models=none"], "save_models: final keeps it"),
        (["rewards.source=file", "rewards.path=x"], "rounds: rewards.source: file"),
        (["locate.after=x"], "rounds: locate.after"),
        (["sample.engine=server", "sample.server.url=http://x"], "rounds: sample.engine: server"),
    ],
)
def test_where_there_can_be_no_rounds(words, said):
    with pytest.raises(UserError, match=said):
        load_config("configs/smollm2_math.yaml", ["rounds=2", *words])
    assert load_config("configs/smollm2_math.yaml", ["rounds=2", "save_models=none", "method=dpo"]).rounds == 2


def test_a_comparison_has_runs_of_one_round():
    comparison = Comparison.load(Path("configs/compare/evidence.yaml"), ["rounds=2", "save_models=final"])
    with pytest.raises(UserError, match="arms: allo: rounds: 2; a comparison's runs have one"):
        comparison.final(comparison.arms[0], {})
