"""Runs on 1, 2 and 4 ranks of real DeepSpeed over gloo; what they do and assert stands in ranks_worker.py.

rank_server.py starts them; torchrun itself, where a test is about what a launcher does.
"""

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
from rank_server import ENVIRONMENT, ROOT, Done, RankServer
from safetensors.torch import load_file
from trainer_worker import logged, sparse_trainer, vector

from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.model.saving import save_model

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.xdist_group("ranks")  # one server for all

WORKER = ROOT / "tests" / "ranks_worker.py"
MODEL = "model/model.safetensors"
JOB = """
name: job
output_dir: {folder}
rivals: [dpo]
save_models: all
model: {{dtype: float32}}
data: {{train: "arithmetic:train[1000:1006]", test: "arithmetic:test[:8]", prompt_template: "{{}}="}}
pretrain:
  {{problems: 32, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
   per_device_train_batch_size: 4, gradient_accumulation_steps: 2}}
sample: {{max_new_tokens: 12, num_return_sequences: 3, batch_size: 2}}
pairs: {{gold: missing}}
locate: {{score: delta, windows: 2}}
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


@pytest.fixture(scope="module")
def server():
    server = RankServer(WORKER)
    yield server
    server.close()


@pytest.fixture
def work(server, tmp_path):
    """Runs a case in its folder, by default the test's; returns the last line that rank 0 said."""

    def run(world: int, case: str, *arguments: object, folder: Path = tmp_path) -> str:
        done = server.run(world, tmp_path / "said", case, folder, *arguments)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout.strip().rpartition("\n")[2]

    return run


@pytest.fixture
def command(server, tmp_path):
    """Runs `allo-fast WORDS` on ranks whose environment says what is given."""

    def run(world: int, *words: object, **environment: str) -> Done:
        return server.run(world, tmp_path / "said", "command", tmp_path, *words, **environment)

    return run


def torchrun(*arguments: object, timeout: float = 200) -> Done:
    """What two ranks do under a real launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, env=os.environ | ENVIRONMENT, **pipes) as process:
        try:
            said = process.communicate(timeout=timeout)
        finally:
            process.terminate()  # a launcher that is killed leaves its ranks behind
    return Done(process.returncode, *said)


def test_no_rank_outlives_a_failure_or_its_time(server, tmp_path):
    done = server.run(2, tmp_path, "stuck", tmp_path)
    assert done.returncode == 1 and "rank 1 fails" in done.stderr
    assert server.run(1, tmp_path, "stuck", tmp_path, timeout=1).returncode == -signal.SIGALRM


@pytest.mark.parametrize(
    "world, cases",
    [
        (1, ["sparse tied", "dense untied"]),
        (2, ["sparse untied", "sparse tied", "dense untied", "dense tied"]),
        (4, ["sparse tied", "dense untied"]),
    ],
)
def test_every_stage_agrees_with_one_process(work, world, cases):
    work(world, "agree", *cases)


@pytest.mark.parametrize(
    "case",
    [
        "same_bits",
        "architectures",
        "bfloat16",
        "cuts",
        "offload",
        "other_reference",
        "rewarded",
        "held_out",
        "guarded",
        "options",
        "generator",
        "closed",
        "starts_small",
        "not_finite",
        "saved_from_shares",
        "deltas",
        "deltas_by_chance",
    ],
)
def test_two_ranks(work, case):
    work(2, case)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_memory_and_traffic_are_as_planned(work, world):
    work(world, "as_planned")


@pytest.mark.parametrize("world", [2, 4])
def test_locating_is_as_planned(work, world):
    work(world, "locating_as_planned")


def test_the_selection_is_the_same_from_shards(work):
    work(4, "located")


@pytest.mark.parametrize("world, scores", [(2, ["snr"]), (4, ["linear"])])
def test_scores_are_those_of_one_process(work, world, scores):
    work(world, "swept", *scores)


def test_locating_goes_on_with_another_number_of_ranks(work, tmp_path):
    moved, straight = tmp_path / "moved", tmp_path / "straight"
    work(0, "swept_until", "whole", 999, folder=straight)
    for world, kind, until in (
        (4, "shares", 9),
        (2, "shares", 9),
        (2, "whole", 13),
        (4, "whole", 5),
        (2, "shares", 999),
    ):
        work(world, "swept_until", kind, until, folder=moved)
    expected, ours = (torch.load(folder / "scores.pt") for folder in (straight, moved))
    for name, score in expected.items():
        assert (ours[name] - score).abs().mean() < 1e-6 * score.max(), name


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_checkpoint_fits_any_world_and_stage(work, tmp_path, kind):
    parameters = json.loads(work(0, "steps", kind, "local", 99, folder=tmp_path / "straight"))["bytes"]
    for world, stage, until in ((4, 2, 1), (2, 3, 2), (0, "local", 3), (4, 3, 4), (2, 1, 5), (1, 0, 99)):
        said = json.loads(work(world, "steps", kind, stage, until, folder=tmp_path / "moved"))
        assert said["step"] == min(until, 6)
        assert said["bytes"] == pytest.approx(parameters, rel=0.01)
    straight, moved = (torch.load(tmp_path / name / "weights.pt") for name in ("straight", "moved"))
    for name, weight in straight.items():
        assert (moved[name] - weight).abs().mean() < 1e-6, name
    if kind == "sparse":
        assert parameters < 0.65 * 4 * sum(weight.numel() for weight in straight.values()), "5 %: values and moments"


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(work, tmp_path):
    started = time.monotonic()
    done = torchrun(WORKER, "killed", tmp_path)
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert signal.Signals.SIGKILL.name in done.stderr
    assert json.loads(work(2, "steps", "sparse", 2, 99))["step"] == 6
    assert json.loads(work(0, "steps", "sparse", "local", 99, folder=tmp_path / "straight"))["step"] == 6
    straight, resumed = (torch.load(folder / "weights.pt") for folder in (tmp_path / "straight", tmp_path))
    assert all((resumed[name] - weight).abs().mean() < 1e-6 for name, weight in straight.items())


def test_the_whole_job_is_the_same_on_two_ranks(command, tmp_path, job):
    """Dense training bit for bit: two micro-batches a step, and sizes whose halves a vector unit fills."""
    for world, settings in ((0, ["name=one"]), (2, ["name=two", "deepspeed=configs/zero3.json"])):
        done = command(world, "run", job, *settings)
        assert done.returncode == 0, done.stderr[-6000:]
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    for stage in ("forget", "learn"):
        assert (
            one["stages"]["05-locate/seed-0"][f"{stage}_sha256"] == two["stages"]["05-locate/seed-0"][f"{stage}_sha256"]
        )
    for path in ("02-sample/seed-0/responses.jsonl", "06-rewards/seed-0/rewards.jsonl", f"04-warmup/seed-0/{MODEL}"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    for stage in ("07-forget", "08-learn"):  # vector units round the last few entries of a vector in another way
        models = [load_file(tmp_path / name / stage / "seed-0" / MODEL) for name in ("one", "two")]
        assert all((models[0][name] - weight).abs().mean() < 1e-6 for name, weight in models[1].items())
    assert {name: held["accuracy"] for name, held in one["models"].items()} == {
        name: held["accuracy"] for name, held in two["models"].items()
    }
    forgotten = [run["stages"]["07-forget/seed-0"] for run in (one, two)]
    assert forgotten[0]["repeated_change"] == forgotten[1]["repeated_change"], "asked of shares, too"
    learned = two["stages"]["08-learn/seed-0"]
    assert (learned["world_size"], learned["zero_stage"]) == (2, 3)
    assert learned["traffic_bytes_per_step"] == pytest.approx(learned["planned_traffic_bytes_per_step"], rel=0.05)
    assert learned["traffic_bytes_per_step"] == sum(learned["traffic_by_operation"].values())
    assert learned["traffic_bytes_per_step"] < learned["planned_dense_traffic_bytes_per_step"]
    again = command(0, "run", job, "name=two")
    assert again.returncode == 0 and "learn seed-0: complete" in again.stdout, "one process takes the run as its own"


def test_mistakes_are_said_once(server, tmp_path, job):
    done = server.run(2, tmp_path / "said", "mistakes", tmp_path, job)
    assert done.returncode == 0, done.stderr[-6000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("allo-fast: ") and "rank 1: " not in line]
    expected = [
        "deepspeed is not set",
        "rank 1 has another configuration",
        "2 ranks cannot divide the 3",
        "not the folder of a run",
        "rank 1 has another data.train: rows.jsonl than rank 0",
    ]
    assert len(said) == len(expected) and all(text in line for text, line in zip(expected, said, strict=True)), said


def test_ranks_that_leave_say_one_line(command, tmp_path, job):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}')
    done = command(2, "run", job, f"deepspeed={path}")
    said = [line for line in done.stderr.splitlines() if "allo-fast: " in line]
    assert done.returncode != 0 and len(said) == 1 and "gradient_clipping is 0.5" in said[0], said


def test_a_missing_peer_is_named(command, job):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29123", "LOCAL_RANK": "0"}
    done = command(0, "run", job, "deepspeed=configs/zero2.json", "ddp_timeout=3", **alone)
    assert done.returncode == 2 and "not all 2 processes met at 127.0.0.1:29123 in 3 s" in done.stderr, done.stderr
    assert "built" not in done.stdout, "DeepSpeed compiles nothing before processes meet"


def test_transformers_trainer_trains_as_in_one_process(work, tmp_path):
    """DistributedDataParallel averages the values' gradients; rank by rank bit for bit, also after resuming."""
    work(2, "in_transformers")
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    one, policy = sparse_trainer(tmp_path / "one", per_device_train_batch_size=8, gradient_accumulation_steps=2)
    one.train()
    for rank in ranks:
        assert torch.equal(rank["values"], ranks[0]["values"]) and torch.equal(rank["resumed"], rank["values"])
        assert rank["norms"] == pytest.approx(logged(one, "grad_norm"), rel=1e-5)
    torch.testing.assert_close(ranks[0]["values"], vector(policy), rtol=0, atol=2e-6)


def test_a_model_too_large_for_a_rank_is_shared_for_inference(work, job):
    work(2, "shared_inference", job)


def test_fine_tuning_on_two_ranks(work, job):
    work(2, "sft", job)


def test_auto_chooses_and_runs(command, tmp_path, job):
    done = command(2, "--local_rank=0", "warmup", job, "deepspeed=auto")
    assert done.returncode != 0 and "run `allo-fast pretrain CONFIG` first" in done.stderr
    done = torchrun("-m", "allo_fast", "pretrain", job, "deepspeed=auto")
    assert done.returncode == 0, done.stderr[-6000:]
    done = command(2, "sample", job, "deepspeed=auto")
    assert done.returncode == 0, done.stderr[-6000:]
    manifest = json.loads((tmp_path / "job/00-pretrain/base/MANIFEST.json").read_text())
    assert manifest["facts"]["zero_stage"] == 0, "the first that fits, of a model this small"
