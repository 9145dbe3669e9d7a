"""What rounding into a bfloat16 base takes from training: to nearest and by chance, beside the same base in float32.

Each trains the same selected weights, from the same values, on the same pairs, at a low and a higher learning rate.
A bfloat16 base is also computed with in bfloat16, whose noise is in the losses of both ways of rounding; the loss of
the weights that each left, computed in float32, shows what rounding alone did. Selected rows of an embedding that no
token of the pairs reads move in none: `moved` of float32 says how many may.
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
from allo_fast.data.batch import collate
from allo_fast.durable import versions
from allo_fast.method.objectives import Preference
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.loading import load_model
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import fingerprint, named_weights
from allo_fast.training.engine import Trainer
from benchmarks.inputs import few_pairs, random_llama

CASES = {"float32": ("float32", None), "nearest": ("bfloat16", None), "stochastic": ("bfloat16", 0)}
HEAD = ("learning_rate", "rounding", "final_loss", "difference", "loss_in_float32", "moved", "seconds")


@dataclass(frozen=True)
class Row:
    learning_rate: float
    rounding: str
    final_loss: float
    difference: float  # from float32: the mean of |loss - its loss| over the last quarter of the steps
    loss_in_float32: float  # of the weights after the last step
    moved: float  # share of the selected weights that differ from the base's in its dtype
    seconds: float  # of all steps
    losses: list[float]


def run(model: str | None, rates: tuple[float, ...], ratio: float, steps: int, out: Path | None) -> list[Row]:
    """Prints a table; writes JSON with the machine and versions when `out` is given."""
    logging.getLogger("allo_fast").setLevel(logging.ERROR)  # what it says of a model, it would say each time
    transformers.utils.logging.disable_progress_bar()
    rows = []
    print("{:>13}  {:<11}{:>11}{:>12}{:>17}{:>8}{:>9}".format(*HEAD))
    with tempfile.TemporaryDirectory() as folder:
        path = model or str(random_llama(Path(folder)))
        for rate in rates:
            exact = None
            for rounding in CASES:
                rows.append(row := _measure(path, rounding, rate, ratio, steps, exact))
                exact = exact or row.losses
                print(
                    f"{rate:>13.0e}  {rounding:<11}{row.final_loss:>11.5f}{row.difference:>12.5f}"
                    f"{row.loss_in_float32:>17.5f}{row.moved:>8.1%}{row.seconds:>9.1f}",
                    flush=True,
                )
    if out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        about = {"device": device, "model": model, "ratio": ratio, "steps": steps, "versions": versions()}
        out.write_text(json.dumps({**about, "date": time.strftime("%Y-%m-%d"), "rows": [*map(asdict, rows)]}, indent=1))
    return rows


def _measure(path: str, rounding: str, rate: float, ratio: float, steps: int, exact: list[float] | None) -> Row:
    """exact: float32's losses; None: they are this row's own."""
    dtype, seed = CASES[rounding]
    model = load_model(path, ModelConfig(dtype="bfloat16")).to(getattr(torch, dtype))
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(weight.shape, generator=draw) for name, weight in named_weights(model).items()}
    policy = SparsePolicy(model, Selection.from_scores(scores, ratio, base=fingerprint(model)), rounding_seed=seed)
    del scores
    settings = TrainConfig(
        learning_rate=rate, gradient_accumulation_steps=1, num_train_epochs=steps, save_steps=steps + 1
    )
    with tempfile.TemporaryDirectory() as folder:
        metrics = list(
            Trainer(policy, few_pairs(model.config.vocab_size), Preference(0.1), settings, Path(folder)).run()
        )
    losses = [step.loss for step in metrics]
    last = slice(-max(1, steps // 4), None)
    return Row(
        learning_rate=rate,
        rounding=rounding,
        final_loss=losses[-1],
        difference=fmean(abs(a - b) for a, b in zip(losses[last], (exact or losses)[last], strict=True)),
        loss_in_float32=_loss_in_float32(path, policy),
        moved=policy.changed() / policy.selected,
        seconds=sum(step.seconds for step in metrics),
        losses=losses,
    )


@torch.no_grad()
def _loss_in_float32(path: str, policy: SparsePolicy) -> float:
    """Of the policy's weights, as they lie in its base, against the model at `path`."""
    model = load_model(path, ModelConfig(dtype="bfloat16")).float()
    logps, corpus = ResponseLogps(model), few_pairs(model.config.vocab_size)
    batch = collate(corpus, corpus.examples, logps.layout).to(model.device)
    reference, weights = logps(batch), named_weights(model)
    for name, weight in policy.full_weights():
        weights[name].copy_(weight)
    return float(Preference(0.1)(logps(batch), reference, batch)[0])
