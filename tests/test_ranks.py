"""Runs on 1, 2 and 4 ranks of real DeepSpeed over gloo; what they do and assert stands in ranks_worker.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file

from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.model.saving import save_model

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[1]
SOURCES = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests"))
ENVIRONMENT = {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}
MODEL = "model/model.safetensors"
JOB = """
name: job
output_dir: {folder}
model: {{dtype: float32}}
data: {{train: "arithmetic:train[1000:1006]", test: "arithmetic:test[:8]", prompt_template: "{{}}="}}
pretrain:
  {{problems: 32, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
   per_device_train_batch_size: 4, gradient_accumulation_steps: 2}}
sample: {{max_new_tokens: 12, num_return_sequences: 3, batch_size: 2}}
pairs: {{gold: missing}}
warmup: {{learning_rate: 1e-4, per_device_train_batch_size: 2, gradient_accumulation_steps: 2}}
rewards: {{template: "{{}}#{{}}#{{}}>", train: {{num_train_epochs: 1, gradient_accumulation_steps: 2}}}}
forget: {{learning_rate: 1e-3, threshold: 0.03, gradient_accumulation_steps: 2}}
learn:
  {{learning_rate: 1e-3, gradient_accumulation_steps: 2, ratio: 0.1, num_train_epochs: 3, reference: "{folder}/other"}}
evaluate: {{max_new_tokens: 12, batch_size: 3}}
"""


@pytest.fixture
def job(tmp_path) -> Path:
    """A configuration whose run lies beside it, as does the model that its last stage compares with."""
    tokenizer = character_tokenizer()
    save_model(tiny_llama(vocab_size=len(tokenizer)), tokenizer, tmp_path / "other")
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(folder=tmp_path))
    return path


def launch(world: int, *arguments, timeout: float = 300) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world else []
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def work(world: int, case: str, folder: Path, *arguments) -> str:
    """The last line that the ranks of a case said; fails with what they said when an assertion failed."""
    done = launch(world, "tests/ranks_worker.py", case, folder, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout.strip().rpartition("\n")[2]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_agrees_with_one_process(tmp_path, world):
    work(world, "agree", tmp_path)


@pytest.mark.parametrize(
    "case",
    [
        "same_bits",
        "architectures",
        "bfloat16",
        "cuts",
        "offload",
        "other_reference",
        "options",
        "generator",
        "closed",
        "starts_small",
        "not_finite",
        "saved_from_shares",
    ],
)
def test_two_ranks(tmp_path, case):
    work(2, case, tmp_path)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_memory_and_traffic_are_as_planned(tmp_path, world):
    work(world, "as_planned", tmp_path)


@pytest.mark.parametrize("world", [2, 4])
def test_the_selection_is_the_same_from_shards(tmp_path, world):
    work(world, "located", tmp_path)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_checkpoint_fits_any_world_and_stage(tmp_path, kind):
    parameters = json.loads(work(0, "steps", tmp_path / "straight", kind, "local", 99))["bytes"]
    for world, stage, until in ((4, 2, 1), (2, 3, 2), (0, "local", 3), (4, 3, 4), (2, 1, 5), (1, 0, 99)):
        said = json.loads(work(world, "steps", tmp_path / "moved", kind, stage, until))
        assert said["step"] == min(until, 6)
        assert said["bytes"] == pytest.approx(parameters, rel=0.01)
    straight, moved = (torch.load(tmp_path / name / "weights.pt") for name in ("straight", "moved"))
    for name, weight in straight.items():
        assert (moved[name] - weight).abs().mean() < 1e-6, name
    if kind == "sparse":
        assert parameters < 0.65 * 4 * sum(weight.numel() for weight in straight.values()), "5 %: values and moments"


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path):
    started = time.monotonic()
    done = launch(2, "tests/ranks_worker.py", "killed", tmp_path)
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert signal.Signals.SIGKILL.name in done.stderr
    assert json.loads(work(2, "steps", tmp_path, "sparse", 2, 99))["step"] == 6
    assert json.loads(work(0, "steps", tmp_path / "straight", "sparse", "local", 99))["step"] == 6
    straight, resumed = (torch.load(folder / "weights.pt") for folder in (tmp_path / "straight", tmp_path))
    assert all((resumed[name] - weight).abs().mean() < 1e-6 for name, weight in straight.items())


def test_the_whole_job_is_the_same_on_two_ranks(tmp_path, job):
    """Dense training bit for bit: two micro-batches a step, and sizes whose halves a vector unit fills."""
    done = launch(0, "-m", "allo_fast", "run", job, "name=one")
    assert done.returncode == 0, done.stderr[-6000:]
    work(2, "command", tmp_path, "run", job, "name=two", "deepspeed=configs/zero3.json")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    for stage in ("forget", "learn"):
        assert (
            one["stages"]["04-locate/seed-0"][f"{stage}_sha256"] == two["stages"]["04-locate/seed-0"][f"{stage}_sha256"]
        )
    for path in ("01-sample/seed-0/responses.jsonl", "05-rewards/seed-0/rewards.jsonl", f"03-warmup/seed-0/{MODEL}"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    for stage in ("06-forget", "07-learn"):  # vector units round the last few entries of a vector in another way
        models = [load_file(tmp_path / name / stage / "seed-0" / MODEL) for name in ("one", "two")]
        assert all((models[0][name] - weight).abs().mean() < 1e-6 for name, weight in models[1].items())
    assert {name: held["accuracy"] for name, held in one["models"].items()} == {
        name: held["accuracy"] for name, held in two["models"].items()
    }
    learned = two["stages"]["07-learn/seed-0"]
    assert (learned["world_size"], learned["zero_stage"]) == (2, 3)
    assert learned["traffic_bytes_per_step"] == pytest.approx(learned["planned_traffic_bytes_per_step"], rel=0.05)
    assert learned["traffic_bytes_per_step"] == sum(learned["traffic_by_operation"].values())
    assert learned["traffic_bytes_per_step"] < learned["planned_dense_traffic_bytes_per_step"]
    again = launch(0, "-m", "allo_fast", "run", job, "name=two")
    assert again.returncode == 0 and "learn seed-0: complete" in again.stdout, "one process takes the run as its own"


def test_mistakes_are_said_once(tmp_path, job):
    done = launch(2, "tests/ranks_worker.py", "mistakes", tmp_path, job)
    assert done.returncode == 0, done.stderr[-6000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("allo-fast: ") and "rank 1: " not in line]
    expected = [
        "deepspeed is not set",
        "rank 1 has another configuration",
        "2 ranks cannot divide the 3",
        "not the folder of a run",
        "rank 1 has another rows.jsonl than rank 0",
    ]
    assert len(said) == len(expected) and all(text in line for text, line in zip(expected, said, strict=True)), said


def test_ranks_that_leave_say_one_line(tmp_path, job):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}')
    done = launch(2, "-m", "allo_fast", "run", job, f"deepspeed={path}")
    said = [line for line in done.stderr.splitlines() if "allo-fast: " in line]
    assert done.returncode != 0 and len(said) == 1 and "gradient_clipping is 0.5" in said[0], said


def test_a_missing_peer_is_named(tmp_path, job, monkeypatch):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29123", "LOCAL_RANK": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    done = launch(0, "-m", "allo_fast", "run", job, "deepspeed=configs/zero2.json", "ddp_timeout=3")
    assert done.returncode == 2 and "not all 2 processes met at 127.0.0.1:29123 in 3 s" in done.stderr, done.stderr


def test_a_model_too_large_for_a_rank_is_shared_for_inference(tmp_path, job):
    work(2, "shared_inference", tmp_path, job)


def test_auto_chooses_and_runs(tmp_path, job):
    done = launch(2, "-m", "allo_fast", "--local_rank=0", "warmup", job, "deepspeed=auto")
    assert done.returncode != 0 and "run `allo-fast pretrain CONFIG` first" in done.stderr
    for stage in ("pretrain", "sample"):
        done = launch(2, "-m", "allo_fast", stage, job, "deepspeed=auto")
        assert done.returncode == 0, done.stderr[-6000:]
    manifest = json.loads((tmp_path / "job/00-pretrain/base/MANIFEST.json").read_text())
    assert manifest["facts"]["zero_stage"] == 0, "the first that fits, of a model this small"
