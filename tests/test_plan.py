import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from transformers import AutoConfig, LlamaConfig

from allo_fast.__main__ import main
from allo_fast.config import Config, SftConfig, UserError
from allo_fast.config_file import load_config
from allo_fast.data.batch import Corpus, attention_mask, collate
from allo_fast.plan.costs import states, traffic
from allo_fast.plan.job import DEVICES, USABLE, choose, disk_bytes, make_plan, table
from allo_fast.plan.shapes import Shape, shape_of, weights_of
from allo_fast.training.zero import Zero

CONFIGS = Path(__file__).parents[1] / "configs"
EIGHT = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def job(*, dtype="bfloat16", **changes) -> Config:
    data = {"train": "a", "test": "b", "max_prompt_tokens": 512, "max_response_tokens": 512}
    model, locate = {"name_or_path": "m", "dtype": dtype, **changes}, {"score": "delta"}
    return Config(name="x", model=model, data=data, locate=locate)


def test_a_shape_has_the_model_s_weights():
    model = tiny_llama(tie_word_embeddings=True)
    shape = shape_of(model.config, "float32")
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert shape_of(EIGHT, "bfloat16").parameters == 8_030_261_248


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


def test_offload_moves_states_to_the_host():
    shape = shape_like((1 << 20,))
    on_device, offloaded = (states(shape, "bfloat16", None, Zero(3, offload=held), 2) for held in (False, True))
    assert offloaded["host"] == on_device["master"] + on_device["moments"] + on_device["gradients"]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_resident_traffic_is_the_selected_share(stage):
    shape, model = shape_like((1 << 20,) * 4), job().model
    sparse, dense = (sum(traffic(shape, model, 8, ratio, Zero(stage), 8).values()) for ratio in (0.05, None))
    assert sparse / dense == pytest.approx(0.05, rel=0.01) and dense == 4 * (4 << 20) * (1 if stage == 0 else 2)
    assert traffic(shape, model, 8, 0.05, Zero(stage), 1) == {}


def test_auto_takes_the_first_stage_that_fits():
    shape, config = shape_of(EIGHT, "bfloat16"), job(gradient_checkpointing=True)
    picked = {
        gpu: {kind: (zero.stage, zero.offload) for kind, zero in choose(config, shape, 8, gpu * 1e9).items()}
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


def plan_of(config, shape, zeros, gpu, gpus=8):
    return make_plan(config, shape, zeros, gpus=gpus, gpu_bytes=gpu * 1e9, device=DEVICES["h100"])


def test_locating_holds_two_models():
    """13B: the warm-up would fit whole on many devices, the base with the warm-up's weights would not."""
    shape = shape_like((130_000_000,) * 100, 40, 5120)
    config = job(gradient_checkpointing=True)
    config.warmup.gradient_accumulation_steps = config.rewards.train.gradient_accumulation_steps = 64
    assert choose(config, shape, 64, 80e9)["dense"].stage == 3
    plan = plan_of(config, shape, dict.fromkeys(("dense", "sparse"), Zero(1)), 80, 64)
    assert {phase.stage: phase.state_bytes for phase in plan.phases}["locate"] == 6 * shape.parameters
    assert any(line.startswith("locate:") and "zero3.json" in line for line in plan.advice)


def test_without_a_warm_up_there_is_one_model_to_locate_in():
    shape, config = shape_like((1 << 20,) * 8), job()
    config.locate.score = "random"
    phases = {phase.stage: phase for phase in plan_of(config, shape, dict.fromkeys(("dense", "sparse")), 80, 1).phases}
    assert list(phases) == ["rewards.train", "locate", "forget", "learn"]
    assert phases["locate"].state_bytes == 2 * shape.parameters
    config.method = "sparse-dpo"
    phases = plan_of(config, shape, dict.fromkeys(("dense", "sparse")), 80, 1).phases
    assert [phase.stage for phase in phases] == ["locate", "learn"]


def test_fine_tuning_is_planned_as_it_trains():
    """Sparse beside learning, with one response to a prompt where that has two; dense beside the warm-up."""
    shape, zeros = shape_of(EIGHT, "bfloat16"), dict.fromkeys(("dense", "sparse"), Zero(0))
    lean, dense = (job().model_copy(update={"sft": SftConfig(ratio=ratio)}) for ratio in (0.05, 1))
    phases = {phase.stage: phase for phase in plan_of(lean, shape, zeros, 80).phases}
    assert (phases["sft"].placement, phases["sft"].state_bytes) == ("resident", phases["learn"].state_bytes)
    assert phases["sft"].memory["activations"] * 3 == phases["learn"].memory["activations"] * 2
    planned = {phase.stage: phase.placement for phase in plan_of(dense, shape, zeros, 80).phases}
    assert planned["sft"] == planned["warmup"] == "dense"
    added = disk_bytes(lean, 1 << 20) - disk_bytes(job(), 1 << 20)
    assert added == pytest.approx((2 + 8 * 0.05) * (1 << 20), rel=1e-4), "the base, the selection and the delta"


def test_a_reference_of_its_own_is_divided_among_the_devices():
    shape, config = shape_of(EIGHT, "bfloat16"), job()
    config.forget.reference = "other"
    plan = plan_of(config, shape, dict.fromkeys(("dense", "sparse"), Zero(1)), 80)
    held = {phase.stage: phase.memory["reference"] for phase in plan.phases if phase.stage != "locate"}
    assert held == {"warmup": 0, "rewards.train": 0, "forget": 2 * shape.parameters // 8, "learn": 0}


def test_what_does_not_fit_says_what_to_change():
    shape = shape_of(EIGHT, "bfloat16")
    plan = plan_of(job(), shape, dict.fromkeys(("dense", "sparse"), Zero(2)), 40)
    assert not plan.fits and any("gradient_checkpointing=true" in line for line in plan.advice)
    plan = plan_of(job(gradient_checkpointing=True), shape, dict.fromkeys(("dense", "sparse"), Zero(1)), 40)
    assert any("zero3.json" in line for line in plan.advice) and "GB too much" in table(plan)
    alone = plan_of(job(gradient_checkpointing=True), shape, dict.fromkeys(("dense", "sparse"), Zero(1)), 24, 1)
    assert all("take more devices" in line for line in alone.advice), "sharding needs several"
    for phase in plan.phases:
        short = phase.device_bytes > USABLE * 40e9
        assert short == any(line.startswith(phase.stage + ":") for line in plan.advice)


def test_what_the_meta_device_cannot_run_is_said():
    """Its weights are known all the same: a run counts its traffic with any attention."""
    config = tiny_llama().config
    config._attn_implementation = "flex_attention"
    assert weights_of(config, "bfloat16").parameters == shape_of(tiny_llama().config, "bfloat16").parameters
    with pytest.raises(UserError, match="llama in bfloat16: its activations cannot be estimated on paper: Flex"):
        shape_of(config, "bfloat16")


@pytest.mark.parametrize("held, message", [(None, "no such file"), ({"hidden_size": -4}, "not a multiple")])
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
    shape, config = shape_of(big, "bfloat16"), job(gradient_checkpointing=True)
    plan = plan_of(config, shape, choose(config, shape, gpus, 80e9), 80, gpus)
    assert all(phase.device_bytes > 0 and (phase.step_s > 0 or phase.stage == "locate") for phase in plan.phases)
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
        assert plan["fits"] and plan["parameters"] > 8e9
    assert AutoConfig.from_pretrained(CONFIGS / "models" / f"{load_config(path).name}.json").num_hidden_layers
