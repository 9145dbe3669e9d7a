"""What rounding into a bfloat16 base takes from training: to nearest and by chance, beside the same base in float32.

Each trains the same selected weights, from the same values, on the same pairs, at a low and a higher learning rate.
The difference to float32 is that of the losses of the last quarter of the steps. Products of a bfloat16 base are in
bfloat16 too, however its values are rounded; the two ways of rounding differ in nothing else. Selected rows of an
embedding that no token of the pairs reads move in neither: float32's `moved` says how many may.
"""

import json
import logging
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
import transformers

from allo_fast.config import ModelConfig, TrainConfig
from allo_fast.method.objectives import Dpo
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.loading import load_model
from allo_fast.model.weights import fingerprint, named_weights
from allo_fast.runs.run import versions
from allo_fast.training.engine import Trainer
from benchmarks.step import pairs, random_llama

CASES = {"float32": ("float32", None), "nearest": ("bfloat16", None), "stochastic": ("bfloat16", 0)}


@dataclass(frozen=True)
class Row:
    learning_rate: float
    rounding: str
    final_loss: float
    difference: float  # from float32: the mean of |loss - its loss| over the last quarter of the steps
    moved: float  # share of the selected weights that differ from the base's in its dtype
    seconds: float  # of all steps
    losses: list[float]


def run(model: str | None, rates: tuple[float, ...], ratio: float, steps: int, out: Path | None) -> list[Row]:
    """Prints a table; writes JSON with the machine and versions when `out` is given."""
    logging.getLogger("allo_fast").setLevel(logging.ERROR)  # what it says of a model, it would say each time
    transformers.utils.logging.disable_progress_bar()
    rows = []
    print(f"{'learning_rate':>13}  {'rounding':<12}{'final_loss':>11}{'difference':>12}{'moved':>8}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        path = model or str(random_llama(Path(folder)))
        for rate in rates:
            exact = None
            for name, (dtype, seed) in CASES.items():
                losses, moved, seconds = _train(path, dtype, seed, rate, ratio, steps)
                exact = exact or losses
                last = slice(-max(1, steps // 4), None)
                difference = fmean(abs(a - b) for a, b in zip(losses[last], exact[last], strict=True))
                rows.append(Row(rate, name, losses[-1], difference, moved, seconds, losses))
                print(
                    f"{rate:>13.0e}  {name:<12}{losses[-1]:>11.5f}{difference:>12.5f}{moved:>8.1%}{seconds:>9.1f}",
                    flush=True,
                )
    if out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        about = {"device": device, "model": model, "ratio": ratio, "steps": steps, "versions": versions()}
        out.write_text(json.dumps({**about, "date": time.strftime("%Y-%m-%d"), "rows": [*map(asdict, rows)]}, indent=1))
    return rows


def _train(
    path: str, dtype: str, seed: int | None, rate: float, ratio: float, steps: int
) -> tuple[list[float], float, float]:
    """The loss of each step, the share of the selected weights that moved, and seconds."""
    model = load_model(path, ModelConfig(dtype="bfloat16")).to(getattr(torch, dtype))
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(weight.shape, generator=draw) for name, weight in named_weights(model).items()}
    selection = Selection.from_scores(scores, ratio, base=fingerprint(model))
    policy = SparsePolicy(model, selection, rounding_seed=seed)
    settings = TrainConfig(
        learning_rate=rate, gradient_accumulation_steps=1, num_train_epochs=steps, save_steps=steps + 1
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(policy, pairs(model.config.vocab_size), Dpo(0.1), settings, Path(folder))
        metrics = list(trainer.run())
    return [row.loss for row in metrics], policy.changed() / policy.selected, sum(row.seconds for row in metrics)
