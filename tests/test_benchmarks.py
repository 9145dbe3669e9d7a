import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import tiny_llama

from allo_fast.config import UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.method.selection import Selection
from allo_fast.model.saving import save_model
from allo_fast.runs.rows import read_jsonl
from allo_kernels.__main__ import main as kernels_main
from allo_kernels.tools import bench
from allo_kernels.tools.bench_cases import Sizes, _sector_bytes
from allo_kernels.tools.bench_head import HeadShape
from allo_kernels.tools.bench_parts import Benchmark, Contender
from allo_kernels.tools.check_cases import cases
from benchmarks import architectures, data, gpu, locate, rewards, zero
from benchmarks.__main__ import main

CASES = list(islice(cases(), 2))
HEADS = (HeadShape("even", 8, 16, 300), HeadShape("capped", 8, 16, 301, softcap=5.0))
SIZES = Sizes(2, 70_000, HEADS, 5000, 2, torch.bfloat16, 1, 64)


def test_sample_counts_the_same_tokens_for_all(tmp_path, capsys, monkeypatch):
    words = ["--problems", "3", "--samples", "2", "--new", "6", "--repeats", "1", "--generate-batch"]
    assert main(["sample", *words, "--out", str(tmp_path / "sample.json")]) == 0
    rows = json.loads((tmp_path / "sample.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["padded", "allo-fast", "transformers generate_batch"]
    assert len({row["tokens"] for row in rows}) == 1 and rows[0]["times_padded"] == 1
    assert "times_padded" in capsys.readouterr().out
    monkeypatch.setattr("benchmarks.sample.Sampler.extend", lambda *_: [row.tokens.append(5) for row in _[1]])
    with pytest.raises(AssertionError, match="greedy texts"):
        main(["sample", *words])


def test_gpu_smoke(tmp_path, capsys):
    """What a GPU machine runs, in miniature, on whatever is here."""
    broken = replace(CASES[0], build=lambda device, *_: (lambda impl: {"x": torch.tensor(float(impl == "torch"))}, {}))
    found = gpu.run(tmp_path / "new", SIZES, [*CASES[:2], broken])
    assert [row["passed"] for row in found.failed] == [False] and len(found.checks) > 2
    written = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert written["torch"] and written["date"] and written["ceilings"]["tflops"] > 0
    ran = [row for row in written["rows"] if not row["absent"]]
    assert all(row["median_ms"] > 0 and row["peak_mib"] >= 0 for row in ran)
    phases = {row["op"].rpartition(", ")[2] for row in ran if row["op"].startswith("token_logps")}
    assert phases == {"forward", "backward", "forward + backward"}
    for row in ran:  # ours was compared with somebody, and with how many bytes it moves each its own
        assert row["contender"] != "allo-fast" or row["difference"] is not None, row
    compact = {row["contender"]: row for row in ran if row["op"] == "AdamW, compact state"}
    rates = [row["gbytes_per_s"] * row["median_ms"] for row in compact.values()]
    assert rates[1] == pytest.approx(20 * rates[0], rel=0.05), "dense AdamW moves the bytes of all weights"
    assert {row["contender"] for row in ran if row["speedup"] == 1} >= {"allo-fast", "allo-fast, 5 % selected"}
    liger = next(row for row in written["rows"] if row["contender"].startswith("Liger"))
    assert (
        "liger_kernel is not installed" in liger["absent"] or "it needs a GPU" in liger["absent"] or liger["median_ms"]
    )
    table = (tmp_path / "new" / "gpu.md").read_text()
    assert f"{len(found.checks)} checks, 1 failed" in table and table.count("\n|") == 2 + len(written["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_says_that_there_is_none(tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device; `allo-fast kernels bench` measures a CPU"):
        main(["gpu", "--out", str(tmp_path)])


def test_gpu_needs_no_engine():
    """A bare GPU machine has torch, triton and numpy, not what the engine's configuration needs."""
    code = "import sys, benchmarks.gpu; sys.exit(any(name in sys.modules for name in ('pydantic', 'allo_fast')))"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ".:kernels"}).returncode == 0


def test_bytes_counted_by_hand():
    # 16 weights of bf16 in a sector: all of it moves unless none of them is selected.
    assert _sector_bytes(1600, torch.bfloat16) == pytest.approx(3200 * (1 - 0.95**16))


def test_rows_go_through_every_stage(tmp_path):
    data.make(tmp_path, 30)
    run = data.open_run(tmp_path)
    for work in data.WORK.values():
        work(run)
    rows = read_jsonl(tmp_path / "runs/data/06-rewards/seed-0/rewards.jsonl")
    assert len(rows) == 30 and len(rows[0]["rewards"]) == len(rows[0]["response_ids"])
    row = data._measured("pairs", tmp_path)
    assert row.seconds > 0 and 0 <= row.anonymous_mib < 100 < row.total_mib


def test_positions(capsys):
    main(["positions", "--weights", "200001", "--ratios", "0.05"])
    rows = [line.split() for line in capsys.readouterr().out.replace("16 bits", "16bits").splitlines()[1:]]
    found = {name: float(size) for _, name, size, _ in rows}
    assert found["bitmask"] == 0.125 and found["int32"] == pytest.approx(0.2, rel=0.02)
    assert found["16bits"] == pytest.approx(0.1, rel=0.02)


def test_loaded(tmp_path, capsys):
    save_model(tiny_llama(), character_tokenizer(), tmp_path / "model")
    assert main(["loaded", "--model", str(tmp_path / "model"), "--dtype", "bfloat16", "--repeats", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"load, another [\d.e+]+, remove [\d.e+-]+, apply [\d.e+-]+, swap [\d.e+-]+, scale", said)
    assert "torch.equal of every weight and the base's: True" in said


def test_rounding(tmp_path, capsys):
    """On a model small enough: by chance the losses are nearer to float32's, and more weights move."""
    save_model(tiny_llama(), character_tokenizer(), tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--steps", "12", "--rates", "5e-6", "--ratio", "0.3"]
    assert main(["rounding", *words, "--out", str(tmp_path / "rounding.json")]) == 0
    written = json.loads((tmp_path / "rounding.json").read_text())
    exact, nearest, stochastic = written["rows"]
    assert [row["rounding"] for row in written["rows"]] == ["float32", "nearest", "stochastic"]
    assert exact["difference"] == 0 < stochastic["difference"] < nearest["difference"]
    lost = [abs(row["loss_in_float32"] - exact["loss_in_float32"]) for row in (nearest, stochastic)]
    assert lost[1] < 0.5 * lost[0] and exact["loss_in_float32"] == pytest.approx(exact["final_loss"], abs=1e-4)
    assert nearest["moved"] < stochastic["moved"] < exact["moved"] <= 1
    assert len(exact["losses"]) == written["steps"] == 12 and exact["losses"][-1] == exact["final_loss"]
    assert "difference" in capsys.readouterr().out


def test_architectures(tmp_path, capsys):
    names = ["llama, dynamic NTK", "mixtral", "mamba", "xlnet"]
    assert main(["architectures", *names, "--json", str(tmp_path / "table.json")]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["runs"] for row in rows] == ["one row > 24"] * 2 + ["shares rows"] * 2 + ["own rows", "refused"]
    assert rows[-1]["refused"].startswith("XLNetLMHeadModel: it is not causal")
    assert len(architectures.CASES) >= 60 and "0 differ" in capsys.readouterr().out


def test_an_architecture_that_differs_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(architectures, "TOLERANCE", 0.0)
    assert main(["architectures", "llama"]) == 1 and "DIFFERS" in capsys.readouterr().out
    with pytest.raises(UserError, match="no-such: no such architecture"):
        main(["architectures", "no-such"])


def test_what_fails_is_a_row_and_fails_the_run(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler\nsecond line")

    contenders = {"allo-fast": Contender(fails), "torch": Contender(lambda: None)}
    monkeypatch.setattr(bench, "benchmarks", lambda *_: iter([Benchmark("op", "shape", contenders)]))
    found = gpu.run(tmp_path, SIZES, [replace(CASES[0], build=fails)])
    assert [row.absent for row in found.rows] == ["failed: RuntimeError: no compiler", ""]
    assert [row["output"] for row in found.failed] == ["RuntimeError: no compiler", "allo-fast"]


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, torch.nan]), torch.ones(3)])
def test_a_wrong_result_ends_the_benchmarks(tmp_path, monkeypatch, wrong):
    right = Contender(lambda: None, result=lambda: [torch.tensor([1.0, 2.0])])
    other = Contender(lambda: None, result=lambda: [wrong])
    made = [Benchmark("op", "shape", {"allo-fast": first, "torch": right}, tolerance=0.04) for first in (right, other)]
    monkeypatch.setattr(bench, "benchmarks", lambda *_: iter([*made, made[0]]))
    found = gpu.run(tmp_path, SIZES, CASES[:1])
    assert [row.difference for row in found.rows] == [0.0, None]
    assert "op, shape, allo-fast: " in found.wrong and "away from torch, allowed 0.04" in found.wrong
    assert found.failed and "of its largest number away" in (tmp_path / "gpu.md").read_text()


def test_rivals_come_from_wheels(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="no wheel in it"):
        gpu.add_wheels(tmp_path)
    with zipfile.ZipFile(tmp_path / "rival-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_rival_from_a_wheel/__init__.py", "NAME = 'rival'")
    gpu.add_wheels(tmp_path)
    assert importlib.import_module("a_rival_from_a_wheel").NAME == "rival"


def test_bench_fails_when_one_of_ours_does(monkeypatch, capsys):
    def fails():
        raise RuntimeError("no kernel")

    given = Benchmark("op", "shape", {"allo-fast": Contender(fails), "torch": Contender(lambda: None)})
    monkeypatch.setattr(bench, "benchmarks", lambda *_: iter([given]))
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: bench.Ceilings(1.0, 1.0))
    assert kernels_main(["bench"]) == 1
    assert "FAIL  op, allo-fast: failed: RuntimeError: no kernel" in capsys.readouterr().out


def test_zero_compares_with_dense_of_the_same_world_and_stage():
    dense = zero.Row(2, 1, "dense", 1400, 1400, 800, 800, 100)
    lines = zero.table([dense, zero.Row(2, 1, "resident", 290, 280, 40, 41, 100)]).splitlines()
    assert lines[2].split() == ["2", "1", "resident", "2.900", "2.800", "0.207", "0.0", "0.0", "0.0500"]


def test_how_often_a_wrong_tokens_reward_is_the_lower():
    scores, wrong = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([True, True, False, False])
    assert rewards.auc(scores, wrong) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_agreement_is_of_responses_that_both_sources_reward():
    first = {("a",): [1.0, 0.0, 1.0], ("left out by the second",): [1.0]}
    assert rewards._agreement(first, {("a",): [1.0, 0.5, 0.0]}) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "job, why",
    [
        ("data: {train: a, test: b, format: preference}", "data.format: preference has no right answers"),
        ("method: sparse-dpo, data: {train: a, test: b}", "method: sparse-dpo has no token rewards"),
    ],
)
def test_jobs_without_token_rewards_or_answers(tmp_path, job, why):
    (config := tmp_path / "c.yaml").write_text(f"{{name: x, model: {{name_or_path: m}}, {job}}}")
    with pytest.raises(SystemExit, match=why):
        main(["rewards", str(config)])


def test_overlap_is_the_share_of_the_first():
    first = Selection.from_scores({"a": torch.tensor([4.0, 3.0, 2.0, 1.0])}, 0.5, base="")
    second = Selection.from_scores({"a": torch.tensor([4.0, 1.0, 3.0, 2.0])}, 0.75, base="")
    assert locate.overlap(first, second) == 0.5 and locate.overlap(second, first) == pytest.approx(1 / 3)
