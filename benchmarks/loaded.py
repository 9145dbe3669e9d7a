"""Deltas on a live model: what applying, removing, swapping and scaling one takes, and that the base comes back."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from allo_fast import load_delta
from allo_fast.config import ModelConfig
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.loading import load_model
from allo_fast.model.weights import fingerprint, named_weights
from benchmarks.inputs import random_llama


def run(model: str | None, dtype: str, ratio: float, repeats: int) -> dict[str, float]:
    """Prints medians in milliseconds; raises AssertionError where a weight of the base is not what it was."""
    with tempfile.TemporaryDirectory() as scratch:
        path, config = model or random_llama(Path(scratch)), ModelConfig(dtype=dtype)
        for seed in (0, 1):
            _write(load_model(path, config), Path(scratch, f"{seed}.safetensors"), ratio, seed)
        live = load_model(path, config)
        before = {name: weight.detach().clone() for name, weight in named_weights(live).items()}
        took, deltas = {}, []
        for number, name in enumerate(("load, the first", "load, another")):
            took[name] = _timed(
                lambda number=number: deltas.append(load_delta(live, f"{scratch}/{number}.safetensors")), live, 1
            )
        first, second = deltas
        entries = sum(map(len, first._delta.positions.values()))
        second.remove()
        took["remove"] = _timed(first.remove, live, repeats, first.apply)
        took["apply"] = _timed(first.apply, live, repeats, first.remove)
        first.apply()
        took["swap"] = _timed(
            lambda: (first if first.applied else second).swap(second if first.applied else first), live, repeats
        )
        first.apply()
        second.remove()
        took["scale"] = _timed(lambda: setattr(first, "scale", first.scale / 2), live, repeats)
        for delta in deltas:
            delta.unload()
        assert all(torch.equal(before[name], weight) for name, weight in named_weights(live).items()), "not the base"
    print(f"{path}, {dtype}, {entries:,} entries; ms: " + ", ".join(f"{name} {ms:.3g}" for name, ms in took.items()))
    print("after all were unloaded torch.equal of every weight and the base's: True")
    return took


def _write(model: PreTrainedModel, path: Path, ratio: float, seed: int) -> None:
    """A delta of as many entries, drawn at random, each moved a little."""
    draw = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(weight.shape, generator=draw) for name, weight in named_weights(model).items()}
    policy = SparsePolicy(model, Selection.from_scores(scores, ratio, base=fingerprint(model)))
    with torch.no_grad():
        for value in policy.values.values():
            value += 1e-3
    policy.write_back()
    policy.save_delta(path)


def _timed(work: Callable[[], object], model: PreTrainedModel, repeats: int, back: Callable = lambda: None) -> float:
    """Median in ms; back: undoes it between two times."""
    times = []
    for _ in range(repeats):
        back()
        _wait(model)
        started = time.perf_counter()
        work()
        _wait(model)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
