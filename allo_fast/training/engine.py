"""One training loop for every stage. It yields metrics and never prints; it can be killed and continued at any step."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from allo_fast import ranks
from allo_fast.config import TrainConfig
from allo_fast.data.batch import Batch, Corpus
from allo_fast.method.objectives import Dpo, Npo, Sft
from allo_fast.method.policy import DensePolicy, SparsePolicy
from allo_fast.training.backend import LocalBackend
from allo_fast.training.examples import Examples, reference_logps
from allo_fast.training.zero import Zero, check_divides

if TYPE_CHECKING:
    from allo_fast.training.backend_deepspeed import DeepSpeedBackend

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
        row = dict(vars(self))
        metrics = row.pop("metrics")
        return json.dumps({**row, **metrics})


class Trainer:
    """Trains `policy` on `corpus`. What it leaves is in `folder`: metrics.jsonl, reference logps, checkpoint.

    token_weights: per response, one number per token, for objectives that weigh tokens. The loss of a step does not
    depend on how its examples are cut into micro-batches. zero: on every rank of a process group by DeepSpeed; the
    ranks divide the micro-batches of each step, so that the step is the same for any number of them. Raises UserError
    where they cannot be divided, and where a rank has another corpus. reference: opens another model than the policy to
    compare with, told whether responses share rows, while the reference's log-probabilities are computed.
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
        zero: Zero | None = None,
        reference: Callable[[bool], AbstractContextManager[Callable[[Batch], Tensor]]] | None = None,
    ):
        self.policy, self.corpus, self.objective, self.config, self.folder = policy, corpus, objective, config, folder
        self.open_reference = reference
        check_divides(config, ranks.world_size())
        self.examples = Examples(corpus, config, seed, token_weights)
        self.steps = self.examples.steps
        self.backend = make_backend(policy, config, len(self.steps), protocol, zero)
        self.traffic = ranks.Traffic() if zero else None
        self.traffic_by_operation: dict[str, int] = {}  # of the last step
        self.reference: dict[str, Tensor] = {}  # number of a micro-batch -> fp32 [R, L], on the CPU

    def prepare(self) -> Iterator[tuple[int, int]]:
        """The reference log-probabilities, where the objective needs them; yields (batches done, all batches).

        Computed once, before the first update, on the very micro-batches that train: there policy and reference agree
        bit for bit, and no second model is needed unless one was given. Kept in a file for a resumed run.
        """
        if not self.objective.needs_reference:
            return
        path, share = self.folder / "reference_logps.safetensors", self.policy.logps.share_prompts
        opened = self.open_reference(share) if self.open_reference else nullcontext(self.backend.response_logps)
        device = self.policy.model.device
        self.reference = yield from reference_logps(path, self.examples, opened, share, device)

    def run(self) -> Iterator[StepMetrics]:
        """Yields after each optimizer step. Raises TrainingError when a loss or a gradient is not finite."""
        if not self.reference:
            deque(self.prepare(), maxlen=0)
        steps_done = self.backend.load(self.folder / CHECKPOINT)
        log = self.folder / "metrics.jsonl"
        if ranks.is_main():
            log_lines = log.read_text().splitlines(keepends=True)[:steps_done] if log.exists() else []
            log.write_text("".join(log_lines))
        with log.open("a") if ranks.is_main() else nullcontext() as lines:
            for number in range(steps_done, len(self.steps)):
                metrics = self._step(number)
                if lines:
                    lines.write(metrics.to_json() + "\n")
                    lines.flush()
                if metrics.step % self.config.save_steps == 0:
                    self.backend.save(self.folder / CHECKPOINT, metrics.step)
                yield metrics

    def state_bytes(self) -> dict[str, int]:
        """Bytes of this rank's live model states by kind; gradients and moments are there once a step was made."""
        return {**self.policy.state_bytes(), **self.backend.state_bytes()}

    def _step(self, number: int) -> StepMetrics:
        started, learning_rate = time.perf_counter(), self.backend.learning_rate
        bytes_before = self.traffic.bytes.copy() if self.traffic else None
        share_prompts = self.policy.logps.share_prompts
        shares = self.examples.share(number)
        batches = [(micro, weight, self.examples.collate(micro, share_prompts)) for micro, weight in shares]
        counts = [[weight * self.objective.count(batch), weight * batch.tokens] for _, weight, batch in batches]
        count, tokens = ranks.add_up(torch.tensor(counts, dtype=torch.float64).sum(0)).tolist()
        totals: dict[str, Tensor] = {}
        for place, (micro, _, batch) in enumerate(batches):
            batch = batch.to(self.policy.model.device)
            logps = self.backend.response_logps(batch)
            loss, metrics = self.objective(logps, self._reference(micro, logps), batch)
            share = counts[place][0] / max(1, count)
            self.backend.backward(loss * share, last=place == len(batches) - 1)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, 0) + value * share
        norm = float(self.backend.step())
        summed = ranks.add_up(torch.stack([value.double() for value in totals.values()]))
        values = dict(zip(totals, summed.tolist(), strict=True))
        if not (torch.tensor([norm, values["loss"]]).isfinite().all()):
            raise TrainingError(f"step {number + 1}: loss {values['loss']}, gradient norm {norm}")
        if self.traffic:
            self.traffic_by_operation = dict(self.traffic.bytes - bytes_before)
            values["traffic_bytes"] = sum(self.traffic_by_operation.values())
        return StepMetrics(
            step=number + 1,
            total_steps=len(self.steps),
            epoch=(number + 1) / len(self.examples.epochs[0]),
            loss=values.pop("loss"),
            grad_norm=norm,
            learning_rate=learning_rate,
            tokens=int(tokens),
            seconds=time.perf_counter() - started,
            metrics=values,
        )

    def _reference(self, micro: int, logps: Tensor) -> Tensor | None:
        if not self.objective.needs_reference:
            return None
        # Before the first update the policy is the reference, whatever kernels gradients may have made it run.
        policy_is_reference = self.open_reference is None and not self.backend.updated
        return logps.detach() if policy_is_reference else self.reference[str(micro)].to(logps.device)


def make_backend(
    policy: DensePolicy | SparsePolicy, config: TrainConfig, total_steps: int, protocol: str, zero: Zero | None
) -> "LocalBackend | DeepSpeedBackend":
    if zero is None:
        return LocalBackend(policy, config, total_steps, protocol)
    from allo_fast.training.backend_deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(policy, config, total_steps, zero)
