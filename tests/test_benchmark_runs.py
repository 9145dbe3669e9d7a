"""Benchmarks that run a whole job, on a run of seconds."""

import json

import pytest

from benchmarks.__main__ import main

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Reports are the subject of other tests, and to draw one takes as long as the stages of such a run."""
    monkeypatch.setattr("allo_fast.commands.write_report", lambda *_: None)


def test_locate_measures_every_score_against_the_warm_up(copied, tmp_path, capsys):
    main(["locate", str(copied[0]), "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out/locate.json").read_text())
    rows = {(row["seed"], row["score"], row["pairs"], row["windows"]): row for row in written["rows"]}
    names = {score for _, score, _, _ in rows}
    assert {"delta", "linear", "snr", "grad_sum", "fisher", "magnitude", "random"} < names
    assert {"linear, no clipping", "linear, pairs in another order", "linear, bfloat16"} < names
    for seed in (0, 1):
        everything = max(pairs for of, score, pairs, _ in rows if (of, score) == (seed, "delta"))
        one, *_, many = [row for key, row in rows.items() if key[:3] == (seed, "linear", everything)]
        assert one["overlap"] == many["overlap"] and one["windows"] == 1 < many["windows"], "in no bit"
        assert many["bytes_per_weight"] < one["bytes_per_weight"] == 20
        assert one["overlap"][2] > 0.5 > rows[seed, "random", 0, 0]["overlap"][2]
        assert rows[seed, "delta", everything, 1]["overlap"] == [1, 1, 1]
    assert set(written["between_seeds"]) == {f"{name}, between seeds" for name in names}
    assert "top 5%" in (out := capsys.readouterr().out) and "linear, between seeds" in out
    assert (tmp_path / "out/locate.svg").stat().st_size > 1000


def test_locate_without_variants(copied, capsys):
    main(["locate", str(copied[0]), "--scores", "random", "--no-variants"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("linear", "random"))]
    assert [line.split()[:2] for line in lines][2:] == [["random,", "between"]] and len(lines) == 3


def test_rewards_compares_sources_on_the_same_responses(copied, tmp_path, capsys):
    path = tmp_path / "rewards.json"
    main(["rewards", str(copied[0]), "seeds=[0]", "--sources", "confidence", "prompted", "--out", str(path)])
    written = json.loads(path.read_text())
    assert [row["source"] for row in written["rows"]] == ["confidence", "prompted"]
    for row in written["rows"]:
        assert 0 <= row["auc"] <= 1 and 0 <= row["wrong_shaded"] <= 1 and row["seconds"] > 0 < row["peak_mib"]
    assert set(written["agreement"]) == {"confidence, prompted"}
    assert "shade the same tokens" in capsys.readouterr().out
