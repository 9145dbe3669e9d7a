"""One training loop for every stage. It yields metrics and never prints; it can be killed and continued at any step."""

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from allo_fast.backend import LocalBackend
from allo_fast.config import TrainConfig
from allo_fast.data.batch import Batch, Corpus, collate, plan_steps
from allo_fast.objectives import Dpo, Npo, Sft
from allo_fast.policy import DensePolicy, SparsePolicy


class TrainingError(RuntimeError):
    """A loss or gradient that is not finite: nothing after it could be trusted."""


@dataclass(frozen=True)
class StepMetrics:
    step: int  # from 1
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int  # that the model computed on, padding left out
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        held = dict(vars(self))
        metrics = held.pop("metrics")
        return json.dumps({**held, **metrics})


class Trainer:
    """Trains `policy` on `corpus`. What it leaves is in `folder`: metrics.jsonl, reference logps, checkpoint.

    token_weights: per response, one number per token, for objectives that weigh tokens. The examples of one step, and
    the loss they share, do not depend on how the step is cut into micro-batches.
    """

    def __init__(
        self,
        policy: DensePolicy | SparsePolicy,
        corpus: Corpus,
        objective: Sft | Npo | Dpo,
        config: TrainConfig,
        folder: Path,
        *,
        seed: int = 0,
        protocol: str = "paper",
        token_weights: Sequence[Sequence[float]] | None = None,
    ):
        self.policy, self.corpus, self.objective, self.config, self.folder = policy, corpus, objective, config, folder
        self.token_weights = token_weights
        self.epochs = [
            plan_steps(corpus, config.per_device_train_batch_size, config.gradient_accumulation_steps, seed + epoch)
            for epoch in range(config.num_train_epochs)
        ]
        self.steps = [step for epoch in self.epochs for step in epoch]
        self.backend = LocalBackend(policy, config, len(self.steps), protocol)
        self.reference: _ReferenceLogps | None = None
        self.state_bytes: dict[str, int] = {}

    def prepare(self) -> Iterator[tuple[int, int]]:
        """The reference log-probabilities, where the objective needs them; yields (batches done, all batches).

        Computed once, before the first update, on the very micro-batches of the first epoch: there policy and
        reference agree bit for bit, and no second model is ever needed. Kept in a file for a resumed run.
        """
        if not self.objective.needs_reference:
            return
        path = self.folder / "reference_logps.safetensors"
        lengths = torch.tensor([len(response.tokens) for response in self.corpus.responses])
        if path.exists():
            self.reference = _ReferenceLogps(load_file(path)["logps"], lengths)
            return
        found = _ReferenceLogps(torch.zeros(int(lengths.sum())), lengths)
        micros = [micro for step in self.epochs[0] for micro in step]
        for done, examples in enumerate(micros, start=1):
            batch = self._collate(examples).to(self.policy.model.device)
            with torch.no_grad():
                found.put(batch, self.policy.response_logps(batch))
            yield done, len(micros)
        partial = path.with_suffix(".partial")
        save_file({"logps": found.flat}, partial)
        os.rename(partial, path)
        self.reference = found

    def run(self) -> Iterator[StepMetrics]:
        """Yields after each optimizer step. Raises TrainingError when a loss or a gradient is not finite."""
        if self.reference is None:
            deque(self.prepare(), maxlen=0)
        done = self.backend.load(self.folder / "checkpoint")
        log = self.folder / "metrics.jsonl"
        kept = log.read_text().splitlines(keepends=True)[:done] if log.exists() else []
        log.write_text("".join(kept))
        with log.open("a") as lines:
            for number in range(done, len(self.steps)):
                metrics = self._step(number)
                lines.write(metrics.to_json() + "\n")
                if metrics.step % self.config.save_steps == 0:
                    lines.flush()
                    self.backend.save(self.folder / "checkpoint", metrics.step)
                yield metrics

    def _step(self, number: int) -> StepMetrics:
        started, learning_rate = time.perf_counter(), self.backend.learning_rate
        micros = [self._collate(examples) for examples in self.steps[number]]
        counts = [self.objective.count(batch) for batch in micros]
        totals: dict[str, Tensor] = {}
        for batch, count in zip(micros, counts, strict=True):
            batch = batch.to(self.policy.model.device)
            ref = self.reference.of(batch) if self.reference else None
            loss, metrics = self.objective(self.policy.response_logps(batch), ref, batch)
            share = count / max(1, sum(counts))
            self.backend.backward(loss * share)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, 0) + value * share
        norm = float(self.backend.step())
        self.state_bytes = {**self.policy.state_bytes(), "moments": self.backend.optimizer_bytes()}
        values = {name: float(value) for name, value in totals.items()}
        if not (torch.tensor([norm, values["loss"]]).isfinite().all()):
            raise TrainingError(f"step {number + 1}: loss {values['loss']}, gradient norm {norm}")
        return StepMetrics(
            step=number + 1,
            total_steps=len(self.steps),
            epoch=(number + 1) / len(self.epochs[0]),
            loss=values.pop("loss"),
            grad_norm=norm,
            learning_rate=learning_rate,
            tokens=sum(batch.tokens for batch in micros),
            seconds=time.perf_counter() - started,
            metrics=values,
        )

    def _collate(self, examples: Sequence[tuple[int, ...]]) -> Batch:
        share = self.policy.logps.share_prompts
        return collate(self.corpus, examples, share_prompts=share, token_weights=self.token_weights)


class _ReferenceLogps:
    """fp32 log-probabilities of every response token of a corpus, on the CPU."""

    def __init__(self, flat: Tensor, lengths: Tensor):
        self.flat, self.starts = flat, lengths.cumsum(0) - lengths

    def of(self, batch: Batch) -> Tensor:
        where = self._where(batch)
        return torch.where(batch.valid.cpu(), self.flat[where], 0.0).to(batch.valid.device)

    def put(self, batch: Batch, logps: Tensor) -> None:
        valid = batch.valid.cpu()
        self.flat[self._where(batch)[valid]] = logps.cpu()[valid]

    def _where(self, batch: Batch) -> Tensor:
        columns = torch.arange(batch.valid.shape[1])
        return (self.starts[batch.responses.cpu()][:, None] + columns).clamp(max=max(0, len(self.flat) - 1))
