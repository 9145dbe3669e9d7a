import json
import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from transformers import AutoConfig, DeepseekV3Config, LlamaConfig, MambaConfig, MistralConfig

from allo_fast.__main__ import main
from allo_fast.config import Config, SftConfig, UserError
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.batch import attention_mask, collate
from allo_fast.data.corpus import Corpus
from allo_fast.model.decoding import BLOCK
from allo_fast.model.generation import generate
from allo_fast.plan.advice import advised
from allo_fast.plan.costs import USABLE, dense_dpo_states, states, traffic
from allo_fast.plan.job import Plan, chosen, disk_bytes, job_of, phases_of, zeros_of
from allo_fast.plan.phase import DEVICES, Job
from allo_fast.plan.rows import Rows, count_rows, example_tokens, micro_batches, unknown_rows
from allo_fast.plan.shapes import Shape, _cached_entries, _keeps_less, shape_of, weights_of
from allo_fast.plan.table import table
from allo_fast.training.zero import Zero
from allo_kernels import memory

NONE = dict.fromkeys(("dense", "sparse"))
CONFIGS = Path(__file__).parents[1] / "configs"
EIGHT = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def settings(*, dtype="bfloat16", **changes) -> Config:
    """A job whose warm-up and rewriter are dense."""
    data = {"train": "a", "test": "b", "max_prompt_tokens": 512, "max_response_tokens": 512}
    model, locate = {"name_or_path": "m", "dtype": dtype, **changes}, {"score": "delta"}
    sample = {"max_new_tokens": 512}
    return Config(name="x", model=model, data=data, locate=locate, rewards={"ratio": 1}, sample=sample)


def job_on(config: Config, shape: Shape, gpu: float, gpus: int = 8) -> Job:
    """gpu: GB of a device."""
    return Job(config, shape, gpus, gpu * 1e9, DEVICES["h100"], unknown_rows(config))


def plan_of(config: Config, shape: Shape, zeros, gpu: float, gpus: int = 8) -> Plan:
    """zeros: of dense and sparse stages, or of both."""
    zeros = zeros if isinstance(zeros, dict) else dict.fromkeys(("dense", "sparse"), zeros)
    return advised(job_on(config, shape, gpu, gpus), zeros)


def by_stage(plan: Plan) -> dict:
    return {phase.stage: phase for phase in plan.phases}


def test_a_shape_has_the_model_s_weights():
    model = tiny_llama(tie_word_embeddings=True)
    shape = shape_of(model.config, "float32")
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    eight = shape_of(EIGHT, "bfloat16")
    assert (eight.parameters, eight.largest) == (8_030_261_248, 4096 * 14336)


def test_activations_are_what_autograd_saves():
    """Of a real model with six layers, against what the shape estimates from one and two."""
    model = tiny_llama(num_hidden_layers=6, hidden_size=64, intermediate_size=160, head_dim=16)
    shape, corpus = shape_of(model.config, "float32"), Corpus()
    corpus.examples.append(tuple(corpus.add(list(range(3, 43)), [list(range(3, 43)), list(range(5, 40))])))
    batch, seen = collate(corpus, corpus.examples), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    held, weights = [], {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(batch.input_ids, attention_mask=attention_mask(batch), position_ids=batch.position_ids)
    measured = sum(size for place, size in seen.items() if place not in weights)
    planned = batch.tokens * (shape.layers * shape.layer_bytes + shape.others_bytes)
    assert planned == pytest.approx(measured, rel=0.15)


def test_the_bytes_of_the_design():
    """5 % of a bfloat16 model: 3 bytes a weight, where dense training in float32 takes 16."""
    shape = shape_like((1 << 20,) * 8)
    per_weight = {kind: size / shape.parameters for kind, size in states(shape, "bfloat16", 0.05, None, 1).items()}
    expected = {"base": 2, "positions": 0.1, "originals": 0.1, "values": 0.2, "moments": 0.4, "gradients": 0.2}
    assert {kind: size for kind, size in per_weight.items() if size} == pytest.approx(expected, rel=0.01)
    assert sum(states(shape, "bfloat16", None, None, 1).values()) == 16 * shape.parameters
    sharded = states(shape, "bfloat16", 0.05, Zero(3), 8)
    assert sharded["base"] == 2 * shape.parameters / 8 and "originals" not in {k for k, v in sharded.items() if v}


def test_clipping_by_all_weights_holds_all_gradients_in_float32():
    config, shape = settings(), shape_like((1 << 20,) * 8)
    every = config.model_copy(update={"learn": config.learn.model_copy(update={"clip": "all"})})
    held = [by_stage(plan_of(each, shape, None, 80, 1))["learn"].memory["gradients"] for each in (config, every)]
    assert held[1] - held[0] == 4 * shape.parameters


def test_offload_moves_states_to_the_host():
    shape = shape_like((1 << 20,))
    on_device, offloaded = (states(shape, "bfloat16", None, Zero(3, offload=held), 2) for held in (False, True))
    assert offloaded["host"] == on_device["master"] + on_device["moments"] + on_device["gradients"]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_resident_traffic_is_the_selected_share(stage):
    shape, model = shape_like((1 << 20,) * 4), settings().model
    sparse, dense = (sum(traffic(shape, model, 8, ratio, Zero(stage), 8).values()) for ratio in (0.05, None))
    assert sparse / dense == pytest.approx(0.05, rel=0.01) and dense == 4 * (4 << 20) * (1 if stage == 0 else 2)
    assert traffic(shape, model, 8, 0.05, Zero(stage), 1) == {}


def test_auto_takes_the_first_stage_that_fits():
    shape, config = shape_of(EIGHT, "bfloat16"), settings(gradient_checkpointing=True)
    picked = {
        gpu: {kind: (zero.stage, zero.offload) for kind, zero in chosen(job_on(config, shape, gpu)).items()}
        for gpu in (24, 40, 80, 141, 192)
    }
    stages = [held["dense"] for held in picked.values()]
    assert stages == sorted(stages, key=lambda held: (-held[0], not held[1])), "less memory, more sharding"
    assert picked[192] == {"dense": (0, False), "sparse": (0, False)}
    assert picked[40]["sparse"] == (0, False) and picked[24]["sparse"][0] == 3
    for gpu, held in picked.items():
        plan = plan_of(config, shape, {kind: Zero(*found) for kind, found in held.items()}, gpu)
        assert plan.fits or plan.advice


def shape_like(sizes: tuple[int, ...], layers: int = 4, hidden: int = 64) -> Shape:
    """Without activations, nothing recomputed."""
    return Shape(sizes, (False,) * len(sizes), layers, hidden, 0, 0)


def test_locating_holds_two_models():
    """13B: the warm-up would fit whole on many devices, the base with the warm-up's weights would not."""
    shape = shape_like((130_000_000,) * 100, 40, 5120)
    config = settings(gradient_checkpointing=True)
    config.warmup.gradient_accumulation_steps = config.rewards.train.gradient_accumulation_steps = 64
    assert chosen(job_on(config, shape, 80, 64))["dense"].stage == 3
    plan = plan_of(config, shape, Zero(1), 80, 64)
    assert by_stage(plan)["locate"].state_bytes == 6 * shape.parameters
    assert any(line.startswith("locate:") and "zero3.json" in line for line in plan.advice)


def test_without_a_warm_up_there_is_one_model_to_locate_in():
    shape, config = shape_like((1 << 20,) * 8), settings()
    config.locate.score = "random"
    phases = by_stage(plan_of(config, shape, None, 80, 1))
    assert list(phases) == ["sample", "locate", "rewards.train", "forget", "learn", "evaluate"]
    assert phases["locate"].state_bytes == 2 * shape.parameters
    config.method = "sparse-dpo"
    assert list(by_stage(plan_of(config, shape, None, 80, 1))) == ["sample", "locate", "learn", "evaluate"]


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ({"source": "rewriter"}, ["rewards.locate", "rewards.train"]),
        ({"source": "rewriter", "ratio": 1}, ["rewards.train"]),
        ({"source": "implicit"}, ["rewards.locate", "rewards.dpo"]),
        ({"source": "confidence"}, ["rewards"]),
        ({"source": "prompted"}, ["rewards"]),
        ({"source": "file", "path": "x"}, []),
    ],
    ids=lambda value: value.get("source") if isinstance(value, dict) else "",
)
def test_rewards_are_planned_as_they_are_made(rewards, expected):
    """Sparse ones hold the base and 5 % of it, with a locating of their own; others a frozen model."""
    shape = shape_of(EIGHT, "bfloat16")
    config = Config(**{**settings(gradient_checkpointing=True).model_dump(), "rewards": rewards})
    phases = {name: phase for name, phase in by_stage(plan_of(config, shape, None, 80, 1)).items() if "rew" in name}
    assert list(phases) == expected
    if "locate" in "".join(expected):
        assert phases[expected[1]].state_bytes == pytest.approx(3 * shape.parameters, rel=0.01)
        assert phases["rewards.locate"].windows and phases["rewards.locate"].state_bytes < USABLE * 80e9
    if expected == ["rewards"]:
        assert phases["rewards"].state_bytes == 2 * shape.parameters


def test_fine_tuning_is_planned_as_it_trains():
    """Sparse beside learning, with one response to a prompt where that has two; dense beside the warm-up."""
    shape = shape_of(EIGHT, "bfloat16")
    lean, dense = (settings().model_copy(update={"sft": SftConfig(ratio=ratio)}) for ratio in (0.05, 1))
    phases = by_stage(plan_of(lean, shape, Zero(0), 80))
    assert list(phases)[:3] == ["sft.locate", "sft", "sample"]
    assert (phases["sft"].placement, phases["sft"].state_bytes) == ("resident", phases["learn"].state_bytes)
    assert phases["sft"].memory["activations"] < phases["learn"].memory["activations"]
    planned = by_stage(plan_of(dense, shape, Zero(0), 80))
    assert planned["sft"].placement == planned["warmup"].placement == "dense" and "sft.locate" not in planned
    added = disk_bytes(lean, 1 << 20) - disk_bytes(settings(), 1 << 20)
    assert added == pytest.approx((2 + 8 * 0.05) * (1 << 20), rel=1e-4), "the base, the selection and the delta"
    lean.seeds = [0, 1]
    assert [by_stage(plan_of(lean, shape, None, 80, 1))[name].times for name in ("sft", "learn")] == [1, 2]


def test_a_reference_of_its_own_is_divided_among_the_devices():
    shape, config = shape_of(EIGHT, "bfloat16"), settings()
    config.forget.reference = "other"
    held = {phase.stage: phase.memory.get("reference") for phase in plan_of(config, shape, Zero(1), 80).phases}
    assert held["forget"] == 2 * shape.parameters // 8 and held["warmup"] == held["learn"] == 0


def test_a_loss_without_a_reference_takes_neither_memory_nor_time_for_one():
    shape, config = shape_of(EIGHT, "bfloat16"), settings()
    config.learn.reference = "other"
    asked = by_stage(plan_of(config, shape, Zero(1), 80))["learn"]
    config.learn.loss_type, config.learn.epsilon = ["simpo"], 1.0
    none = by_stage(plan_of(config, shape, Zero(1), 80))["learn"]
    assert asked.memory["reference"] == 2 * shape.parameters // 8 and none.memory["reference"] == 0
    assert none.step_s == asked.step_s and none.seconds < asked.seconds


@pytest.mark.parametrize("padded", [False, True])
def test_sampling_holds_what_generate_does(monkeypatch, padded):
    """Keys and values to the byte; the rest at most what is planned, and not half of it."""
    monkeypatch.setattr("allo_fast.model.generation.why_padded", lambda model: "it is tried" if padded else None)
    tokenizer = character_tokenizer()
    model = tiny_llama(num_hidden_layers=6, hidden_size=64, intermediate_size=160, head_dim=16, vocab_size=4000)
    shape, ids = replace(shape_of(model.config, "float32"), cache_bound=padded), torch.randint(3, 20, (4, 40))
    with memory.Live() as live, torch.no_grad():
        model.base_model(ids, use_cache=False)
    assert live.most == pytest.approx(ids.numel() * shape.forward_bytes, rel=0.1)
    cached = model(ids, use_cache=True).past_key_values.layers
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cached) == ids.numel() * shape.cache_bytes
    data = {"train": "a", "test": "b", "max_prompt_tokens": 40}
    sample = {"batch_size": 4, "num_return_sequences": 5, "max_new_tokens": 30}
    config = Config(name="x", model={"name_or_path": "m", "dtype": "float32"}, data=data, sample=sample)
    planned = by_stage(plan_of(config, shape, None, 80, 1))["sample"].memory
    asked = {"max_new_tokens": 30, "num_return_sequences": 5, "temperature": 1.0, "top_p": 0.95}
    with memory.Live() as live:
        generate(model, tokenizer, ids.tolist(), {2}, **asked)
    beside = sum(planned.values()) - planned["base"]
    positions = 20 * 70 if padded else 20 * BLOCK + 4 * 40
    assert planned["KV cache"] == pytest.approx(positions * shape.cache_bytes, rel=0.1)
    assert 0.5 * beside < live.most < beside


@pytest.mark.parametrize(
    "config, entries, bound",
    [
        (LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8), 2 * 2 * 8, False),
        (LlamaConfig(hidden_size=64, num_attention_heads=4), 2 * 64, False),
        (MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, sliding_window=4), 2 * 16, True),
        (MambaConfig(hidden_size=64, num_hidden_layers=2), 2 * 64, True),
        (DeepseekV3Config(num_attention_heads=4, kv_lora_rank=8), 4 * (128 + 64 + 128), True),
    ],
    ids=["grouped", "all-heads", "sliding", "recurrent", "latent"],
)
def test_what_a_layer_caches_of_a_token(config, entries, bound):
    assert _cached_entries(config) == entries and _keeps_less(config) == bound


def test_rows_are_counted_where_they_can_be(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(7)))
    data = {"train": f"{path}[:5]", "test": str(path), "format": "preference"}
    config = Config(name="x", model={"name_or_path": "m"}, data=data)
    assert count_rows(config) == Rows(5, 5, 5, 5, 7, 2, True, True)
    monkeypatch.setenv("HOME", str(tmp_path))
    config.data.train = "~/rows.jsonl[:5]"
    assert count_rows(config) == Rows(5, 5, 5, 5, 7, 2, True, True)
    config.data.train = "org/name:train"
    assert count_rows(config) == Rows(1000, 1000, 1000, 1000, 7, 2, False, True)
    config.data.format = "multiple_choice"
    assert count_rows(config) == Rows(1000, 1000, 4000, 4000, 1000, 5), "which is no such file"
    config = load_config(CONFIGS / "quickstart.yaml")
    assert (count_rows(config).problems, count_rows(config).tests) == (250, 500)


def test_times_are_of_whole_stages():
    """Twice the rows take twice as long; a run has each stage once a seed, and evaluates the base once."""
    shape, config = shape_of(EIGHT, "bfloat16"), settings(gradient_checkpointing=True)
    config.seeds, config.rivals = [0, 1, 2], ["dpo"]
    once = job_on(config, shape, 80, 1)
    twice = replace(once, rows=Rows(*(2 * count for count in (1000, 1000, 5000, 5000, 1000))))
    for one, two in zip(phases_of(once, NONE), phases_of(twice, NONE), strict=True):
        assert two.seconds == pytest.approx(2 * one.seconds, rel=0.1)
        assert one.times == (7 if one.stage == "evaluate" else 3)
    plan = advised(once, NONE)
    assert plan.seconds == sum(phase.times * phase.seconds for phase in plan.phases)


def test_rounds_take_as_often_what_is_not_made_once():
    shape, config = shape_of(EIGHT, "bfloat16"), settings()
    config.sft = SftConfig()
    one = by_stage(plan_of(config, shape, None, 80, 1))
    config.rounds = 3
    three = by_stage(plan_of(config, shape, None, 80, 1))
    often = {name: 1 if name.startswith("sft") else 3 for name in one} | {"evaluate": 7 / 3}
    assert {name: phase.times / one[name].times for name, phase in three.items()} == often
    config.rivals, config.locate.score = ["dpo"], "linear"
    assert by_stage(plan_of(config, shape, None, 80, 1))["warmup"].times == 1, "the first round's rival alone"


def test_both_dense_rivals_stand_beside_what_trains():
    """18 bytes a weight with a float32 master, 10 with an optimizer in bfloat16; divided as the stage is."""
    for stage, high, low in ((0, 18, 10), (1, 6 + 12 / 8, 6 + 4 / 8), (2, 4 + 14 / 8, 4 + 6 / 8), (3, 18 / 8, 10 / 8)):
        found = dense_dpo_states(8000, Zero(stage), 8), dense_dpo_states(8000, Zero(stage), 8, low=True)
        assert found == (8000 * high, 8000 * low)
    plan = plan_of(settings(gradient_checkpointing=True), shape_of(EIGHT, "bfloat16"), Zero(0), 80)
    said = table(plan)
    assert "dense DPO, fp32 master" in said and "dense DPO, all-bf16 optimizer" in said and "144.54" in said


def test_what_the_meta_device_cannot_run_is_said():
    """Its weights are known all the same: a run counts its traffic with any attention."""
    config = tiny_llama().config
    config._attn_implementation = "flex_attention"
    assert weights_of(config, "bfloat16").parameters == shape_of(tiny_llama().config, "bfloat16").parameters
    with pytest.raises(UserError, match="llama in bfloat16: its activations cannot be estimated on paper: Flex"):
        shape_of(config, "bfloat16")


@pytest.mark.parametrize(
    "held, message",
    [
        (None, "no such file"),
        ({"hidden_size": -4}, "not a multiple"),
        ({"num_attention_heads": 0}, "by zero"),
        ({"dtype": "none_such"}, "no attribute 'none_such'"),
    ],
)
def test_models_that_cannot_be_planned(tmp_path, held, message, capsys):
    path = tmp_path / "config.json"
    if held:
        path.write_text(json.dumps({"model_type": "llama", **held}))
    words = ["plan", str(CONFIGS / "llama3_8b.yaml"), "--gpus", "8", "--model-config", str(path)]
    assert main(words) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [1, 8, 1024])
@pytest.mark.parametrize("layers, hidden", [(30, 576), (126, 16384)], ids=["135M", "405B"])
def test_from_135m_to_405b_and_1_to_1024_devices(gpus, layers, hidden):
    big = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64)
    shape, config = shape_of(big, "bfloat16"), settings(gradient_checkpointing=True)
    plan = plan_of(config, shape, chosen(job_on(config, shape, 80, gpus)), 80, gpus)
    assert all(phase.device_bytes > 0 and (phase.seconds > 0 or phase.stage == "locate") for phase in plan.phases)
    assert json.loads(json.dumps(plan.to_dict()))["fits"] == plan.fits


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("llama*.yaml")), ids=lambda path: path.stem)
def test_shipped_jobs_fit_the_machines_they_name(path, capsys):
    """The first lines of each say `allo-fast plan` with its machine; that command must say that it fits."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#   allo-fast plan ")]
    assert lines
    for line in lines:
        words = line.removeprefix("#   allo-fast ").split()
        root = CONFIGS.parent
        words = [str(root / word) if word.startswith("configs/") else word for word in words]
        words = [word.replace("deepspeed=configs", f"deepspeed={CONFIGS}") for word in words]
        assert main([*words, "--json"]) == 0, capsys.readouterr().out
        plan = json.loads(capsys.readouterr().out)
        assert plan["fits"] and plan["peak_bytes"] <= USABLE * plan["gpu_bytes"] and plan["seconds"] > 0
    assert AutoConfig.from_pretrained(CONFIGS / "models" / f"{load_config(path).name}.json").num_hidden_layers


def written_rows(page: str) -> list[list[str]]:
    """Of the table of jobs and machines."""
    lines = (CONFIGS.parent / page).read_text().splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| job and machine |"))
    return [line.strip("| ").split(" | ") for line in takewhile(lambda line: line.startswith("|"), lines[head + 2 :])]


def planned_row(machine: str) -> list[str]:
    small = ["sample.batch_size=4"] * ("[1]" in machine or "[2]" in machine)
    small += ["rewards.batch_size=8", "evaluate.batch_size=32"] * ("[1]" in machine)
    (size,) = re.findall(r"Llama-3(?:.2)?-(\d+B)", machine) or ["8B"]
    name = {"1B": "llama3_2_1b", "3B": "llama3_2_3b"}.get(size, f"llama3_{size.lower()}")
    gpus, memory = (int(found[0]) if (found := re.findall(p, machine)) else 1 for p in (r"(\d+) x", r"(\d+) GB"))
    words = [*small, f"deepspeed={'auto' if gpus > 1 else 'null'}"]
    config = load_config(CONFIGS / f"llama3_{'70b' if size == '70B' else '8b'}.yaml", words, auto="bfloat16")
    job = job_of(config, gpus, memory * 1e9, str(CONFIGS / f"models/{name}.json"))
    job = replace(job, device=DEVICES["h100" if "H100" in machine else "a100"])
    plan = advised(job, zeros_of(config, lambda: job))
    learn, locate, peak = by_stage(plan)["learn"], by_stage(plan)["locate"], plan.peak
    stage = {"rewards.locate": "rewriter's locating", "locate": "locating"}[peak.stage]
    pair = "{:.1f}, {:.1f}".format
    return [
        machine,
        "whole" if gpus == 1 else f"ZeRO-{zeros_of(config, lambda: job)['sparse'].stage}",
        f"{stage} {peak.device_bytes / 1e9:.1f} of {USABLE * memory:.1f}",
        pair(learn.state_bytes / 1e9, learn.device_bytes / 1e9),
        f"{locate.windows}, {locate.passes}",
        pair(learn.dense_dpo_bytes / 1e9, learn.dense_dpo_low_bytes / 1e9),
        f"{plan.seconds / 3600:.1f}",
    ]


def test_the_tables_of_the_docs_are_what_is_planned():
    rows = written_rows("docs/clusters.md")
    assert len(rows) > 10 and rows == [planned_row(row[0]) for row in rows]
    assert all(row in rows for row in written_rows("README.md"))


def test_examples_are_not_cut_to_fill_a_micro_batch():
    config = settings()
    assert sum(example_tokens(config, "learn")) == 1536
    for budget, expected in ((None, 32), (2048, 128), (3071, 128), (3072, 64), (10_000, 22)):
        train = config.learn.model_copy(update={"max_tokens_per_batch": budget})
        assert train.examples_per_step == 128 and micro_batches(config, "learn", train) == expected
