import json
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from allo_fast.config import Config, LearnConfig, UserError
from allo_fast.config_file import load_config
from allo_fast.training.zero import PERSISTENT, Zero, check_divides, read_zero

CONFIGS = Path(__file__).parents[1] / "configs"
JSONS = sorted(CONFIGS.glob("*.json"))


def config(**model) -> Config:
    return Config(name="x", model={"name_or_path": "m", "dtype": "bfloat16"} | model, data={"train": "a", "test": "b"})


def read(tmp_path, held: object, **model) -> Zero:
    path = tmp_path / "ds.json"
    path.write_text(held if isinstance(held, str) else json.dumps(held))
    return read_zero(str(path), config(**model))


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_shipped_files_are_read(path):
    zero = read_zero(str(path), config())
    assert zero.stage == int(path.stem[4]) and zero.offload == path.stem.endswith("offload")
    engine = zero.engine_config(10**6)
    assert engine["zero_optimization"]["stage"] == zero.stage and "auto" not in json.dumps(engine)


@pytest.mark.parametrize(
    "held, message",
    [
        ("{", "not JSON"),
        ("[]", 'expected an object with "zero_optimization"'),
        ({"zero_optimization": {"stage": 4}}, "stage: expected 0, 1, 2 or 3, got 4"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_sise": "auto"}},
            r"reduce_bucket_sise \(did you mean reduce_bucket_size",
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": "auto"}}, "expected 0, 1, 2 or 3, got 'auto'"),
        ({"zero_optimization": {"stage": 2, "a": 1, "bcd": 2}}, "unsupported: a, bcd;"),
        ({"zero_optimization": {"stage": True}}, "expected 0, 1, 2 or 3, got True"),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "unsupported: round_robin_gradients; known are stage,",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "unsupported: offload_param"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "expected device none or cpu"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "none or cpu"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2}, "gradient_cliping": 1.0},
            r"unsupported: gradient_cliping \(did you mean gradient_clipping",
        ),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "optimizer: remove it"),
        (
            {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5},
            "is 0.5, but the run's rewards.train.max_grad_norm is 1.0",
        ),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 7}, "train_batch_size: set it to"),
        ({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 8}, "steps: set it to"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "fp16: not supported"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}, "bf16.enabled is False, but model.dtype"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "no"}}, "bf16.enabled: expected true, false or"),
        ({"zero_optimization": {"stage": 2}, "comms_logger": True}, "comms_logger: expected dict, got True"),
        (
            {"zero_optimization": {"stage": 2}, "comms_logger": {"enabled": "often"}},
            "comms_logger.enabled: expected bool, got 'often'",
        ),
        (
            {"zero_optimization": {"stage": 2}, "comms_logger": {"prof_op": []}},
            r"comms_logger: unknown or unsupported: prof_op \(did you mean prof_ops",
        ),
        (
            {"zero_optimization": {"stage": 2}, "flops_profiler": {"profile_step": 1.5}},
            "flops_profiler.profile_step: expected int, got 1.5",
        ),
        (
            {"zero_optimization": {"stage": 2}, "flops_profiler": {"output_file": 1}},
            "flops_profiler.output_file: expected str, got 1",
        ),
        (
            {"zero_optimization": {"stage": 2}, "steps_per_print": float("inf")},
            "steps_per_print: expected int, got inf",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, held, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, held)


def test_no_file():
    with pytest.raises(UserError, match="nowhere.json: cannot be read: No such file"):
        read_zero("nowhere.json", config())


def test_what_agrees_is_taken(tmp_path):
    held = {"bf16": {"enabled": "auto"}, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": "auto"}
    options = {"stage": 3, PERSISTENT: 7, "stage3_max_live_parameters": "auto", "offload_optimizer": "auto"}
    zero = read(
        tmp_path, {**held, "zero_optimization": options, "wall_clock_breakdown": True, "steps_per_print": "auto"}
    )
    assert "auto" not in zero.options.values()
    engine = zero.engine_config(10**6)
    assert engine["zero_optimization"][PERSISTENT] == 7 and engine["wall_clock_breakdown"]
    assert engine["gradient_clipping"] == 0.0, "the optimizer clips"
    assert read(tmp_path, {"zero_optimization": {"stage": 1}, "fp16": {"enabled": False}}, dtype="float32").stage == 1


def test_what_has_no_effect_is_said(tmp_path, caplog):
    passed_on = {"comms_logger": {"enabled": True}, "flops_profiler": {"profile_step": 5, "recompute_fwd_factor": 1}}
    held = {"zero_allow_untested_optimizer": True, "steps_per_print": 1e5, "bf16": None, **passed_on}
    zero = read(tmp_path, {**held, "zero_optimization": {"stage": 3, "sub_group_size": 1e9}})
    assert zero.others == {"steps_per_print": 100_000, **passed_on} and zero.options == {"stage": 3}
    assert "zero_allow_untested_optimizer is not used" in caplog.text
    assert "sub_group_size is not used: one optimizer step takes all gradients" in caplog.text


def test_indivisible_steps_name_sizes_that_do():
    check_divides(LearnConfig(gradient_accumulation_steps=4), 2)
    with pytest.raises(UserError, match="x.per_device_train_batch_size=3 x.gradient_accumulation_steps=4"):
        check_divides(LearnConfig(per_device_train_batch_size=4, gradient_accumulation_steps=3), 2, "x")
    with pytest.raises(UserError, match="nor its 9 examples; gradient_accumulation_steps=4 would do"):
        check_divides(LearnConfig(per_device_train_batch_size=3, gradient_accumulation_steps=3), 2)


def test_the_release_needs_one_process(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nmodel: {name_or_path: m}\ndata: {train: a, test: b}\n")
    for change in ("protocol=release", "learn.clip=all"):
        with pytest.raises(UserError, match="need one process"):
            load_config(path, ["deepspeed=auto", change])
