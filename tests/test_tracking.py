"""Curves of training for others' programs."""

import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
from conftest import MICRO

from allo_fast.__main__ import main
from allo_fast.config import UserError
from allo_fast.runs.rows import read_jsonl
from allo_fast.training.metrics import StepMetrics
from allo_fast.training.tracking import require, tracking

PLACE = {"name": "learn-seed-0", "config": {"name": "micro"}}


def step(number: int, loss: float) -> StepMetrics:
    return StepMetrics(number, 9, 0.5, loss, 1.0, 1e-5, 128, 0.1, {"rewards/margins": 2 * loss})


def read_curves(folder) -> dict[str, dict[int, float]]:
    """By name and step, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    found = defaultdict(dict)
    for name in events.Tags()["scalars"]:
        found[name] = {event.step: event.value for event in events.Scalars(name)}
    return found


def test_tensorboard_has_every_step_once(tmp_path):
    for steps in (range(1, 6), range(4, 8)):  # killed behind step 5, whose checkpoint was step 3's
        with tracking("tensorboard", tmp_path, **PLACE) as record:
            for number in steps:
                record(step(number, number + (steps.start == 4) / 2))
    curves = read_curves(tmp_path / "tensorboard/learn-seed-0")
    assert curves["loss"] == {1: 1, 2: 2, 3: 3, 4: 4.5, 5: 5.5, 6: 6.5, 7: 7.5}
    assert curves["rewards/margins"][7] == 15 and curves.keys() >= {"learning_rate", "grad_norm", "seconds"}


def test_weights_and_biases(tmp_path, monkeypatch):
    logged, begun = [], {}

    def init(**given):
        begun.update(given)
        return SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # what it would import
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with tracking("wandb", tmp_path, **PLACE) as record:
        record(step(3, 0.5))
    assert logged[0][0] == 3 and logged[0][1]["loss"] == 0.5 and logged[1] == "end"
    assert begun["project"] == "mine" and begun["name"] == "micro learn-seed-0" and begun["group"] == "micro"
    assert begun["config"] == PLACE["config"] and begun["dir"] == tmp_path


def test_what_is_not_installed_is_said_before_the_run(monkeypatch):
    require("none")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="report_to: wandb is not installed: pip install wandb"):
        require("wandb")


def test_a_run_of_it(tmp_path):
    pytest.importorskip("tensorboard")
    (config := tmp_path / "micro.yaml").write_text(MICRO.format(folder=tmp_path))
    assert main(["run", str(config), "method=dpo", "seeds=[0]", "rivals=[]", "report_to=tensorboard"]) == 0
    rows = read_jsonl(tmp_path / "micro/04-warmup/seed-0/metrics.jsonl")
    curves = read_curves(tmp_path / "micro/tensorboard/warmup-seed-0")
    assert curves["loss"] == pytest.approx({row["step"]: row["loss"] for row in rows})
    assert curves["rewards/accuracies"] and (tmp_path / "micro/tensorboard/pretrain-base").is_dir()
