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
from allo_fast.data.batch import Batch, Corpus, collate, plan_micro_batches, plan_steps
from allo_fast.objectives import Dpo, Npo, Sft
from allo_fast.policy import DensePolicy, SparsePolicy

CHECKPOINT = "checkpoint.safetensors"


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

    token_weights: per response, one number per token, for objectives that weigh tokens. The loss of a step does not
    depend on how its examples are cut into micro-batches.
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
        self.micro_batches = plan_micro_batches(corpus, config.per_device_train_batch_size, seed)
        per_step, epochs = config.gradient_accumulation_steps, config.num_train_epochs
        self.epochs = plan_steps(len(self.micro_batches), per_step, epochs, seed)
        self.steps = [step for epoch in self.epochs for step in epoch]
        self.backend = LocalBackend(policy, config, len(self.steps), protocol)
        self.reference: dict[str, Tensor] = {}  # number of a micro-batch -> fp32 [R, L], on the CPU

    def prepare(self) -> Iterator[tuple[int, int]]:
        """The reference log-probabilities, where the objective needs them; yields (batches done, all batches).

        Computed once, before the first update, on the very micro-batches that train: there policy and reference agree
        bit for bit, and no second model is ever needed. Kept in a file for a resumed run.
        """
        path = self.folder / "reference_logps.safetensors"
        if not self.objective.needs_reference:
            return
        if path.exists():
            self.reference = load_file(path)
            return
        found = {}
        for number in range(len(self.micro_batches)):
            with torch.no_grad():
                found[str(number)] = self.policy.response_logps(self._collate(number)).cpu()
            yield number + 1, len(self.micro_batches)
        partial = path.with_suffix(".partial")
        save_file(found, partial)
        os.rename(partial, path)
        self.reference = found

    def run(self) -> Iterator[StepMetrics]:
        """Yields after each optimizer step. Raises TrainingError when a loss or a gradient is not finite."""
        if not self.reference:
            deque(self.prepare(), maxlen=0)
        done = self.backend.load(self.folder / CHECKPOINT)
        log = self.folder / "metrics.jsonl"
        kept = log.read_text().splitlines(keepends=True)[:done] if log.exists() else []
        log.write_text("".join(kept))
        with log.open("a") as lines:
            for number in range(done, len(self.steps)):
                metrics = self._step(number)
                lines.write(metrics.to_json() + "\n")
                if metrics.step % self.config.save_steps == 0:
                    lines.flush()
                    self.backend.save(self.folder / CHECKPOINT, metrics.step)
                yield metrics

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the live model states by kind; gradients and moments are there once a step was made."""
        return {**self.policy.state_bytes(), "moments": self.backend.optimizer_bytes()}

    def _step(self, number: int) -> StepMetrics:
        started, learning_rate = time.perf_counter(), self.backend.learning_rate
        batches = [self._collate(micro) for micro in self.steps[number]]
        counts = [self.objective.count(batch) for batch in batches]
        totals: dict[str, Tensor] = {}
        for micro, batch, count in zip(self.steps[number], batches, counts, strict=True):
            logps = self.policy.response_logps(batch)
            loss, metrics = self.objective(logps, self._reference(micro, logps), batch)
            share = count / max(1, sum(counts))
            self.backend.backward(loss * share)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, 0) + value * share
        norm = float(self.backend.step())
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
            tokens=sum(batch.tokens for batch in batches),
            seconds=time.perf_counter() - started,
            metrics=values,
        )

    def _reference(self, micro: int, logps: Tensor) -> Tensor | None:
        if not self.objective.needs_reference:
            return None
        # Before the first update the policy is the reference, whatever kernels gradients may have made it run.
        return self.reference[str(micro)].to(logps.device) if self.backend.updated else logps.detach()

    def _collate(self, micro: int) -> Batch:
        share = self.policy.logps.share_prompts
        batch = collate(self.corpus, self.micro_batches[micro], share_prompts=share, token_weights=self.token_weights)
        return batch.to(self.policy.model.device)
