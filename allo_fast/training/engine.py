"""One training loop for every stage. It yields metrics and never prints; it can be killed and continued at any step."""

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from allo_fast import ranks, signals
from allo_fast.config import TrainConfig
from allo_fast.data.batch import Batch
from allo_fast.data.corpus import Corpus
from allo_fast.durable import SCRATCH
from allo_fast.journal import Journal
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Npo, Preference, Sft
from allo_fast.method.policy import SparsePolicy
from allo_fast.training.backends import make_backend
from allo_fast.training.checkpoints import CHECKPOINTS, Checkpoints
from allo_fast.training.examples import Examples
from allo_fast.training.guard import Guard
from allo_fast.training.held_out import HeldOut
from allo_fast.training.metrics import LOG, StepMetrics
from allo_fast.training.reference import TOKENS, Opened, Reference, described, kept, reference_logps
from allo_fast.training.steps import MicroBatch
from allo_fast.training.watching import Watches
from allo_fast.training.zero import Zero, check_divides

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A loss, gradient or weight that is not finite: nothing after it could be trusted."""


@dataclass(frozen=True)
class _Asks:
    """What all ranks do after a step: save a checkpoint; end."""

    due: bool
    stop: bool


class Trainer:
    """Trains `policy` on `corpus`. What it leaves is in `folder`: metrics.jsonl, two checkpoints.

    mark: of what these are; those of something else are not gone on from. token_weights: per response, one number per
    token, for objectives that weigh tokens. The loss of a step does not depend on how its examples are cut into micro-
    batches. zero: on every rank of a process group by DeepSpeed; the ranks divide the micro-batches of each step, the
    same to rounding for any number of them. Raises UserError where they cannot be divided, and where a rank has another
    corpus. reference: opens another model than the policy to compare with, while the reference's log-probabilities are
    computed. cache: where these are kept, by content; None: in `folder`. online: a sparse policy that is its own
    reference computes them anew in each step instead. guard, held_out: look at the policy every so many steps, and may
    end training; `made` is how many steps there were.
    """

    def __init__(
        self,
        policy: DensePolicy | SparsePolicy,
        corpus: Corpus,
        objective: Sft | Npo | Preference,
        config: TrainConfig,
        folder: Path,
        *,
        mark: str = "",
        seed: int = 0,
        protocol: str = "paper",
        token_weights: Sequence[Sequence[float]] | None = None,
        zero: Zero | None = None,
        reference: Callable[[], AbstractContextManager[Opened]] | None = None,
        cache: Path | None = None,
        online: bool = False,
        guard: Guard | None = None,
        held_out: HeldOut | None = None,
    ):
        self.policy, self.corpus, self.objective, self.config, self.folder = policy, corpus, objective, config, folder
        self.open_reference, self.mark, self.cache = reference, mark, cache or folder / SCRATCH
        self.online = online and isinstance(policy, SparsePolicy) and reference is None and objective.needs_reference
        self.checkpoints = Checkpoints(folder, mark)
        check_divides(config, ranks.world_size())
        self.examples = Examples(corpus, config, seed, token_weights)
        self.steps, self.made = self.examples.steps, 0
        self.guard, self.held_out = guard, held_out
        self.watches = Watches(len(self.steps), self.examples.budget or TOKENS, guard=guard, held_out=held_out)
        self.backend = make_backend(policy, config, len(self.steps), protocol, zero)
        self.examples.layout, self.traffic = policy.logps.layout, ranks.Traffic() if zero else None
        # Of the last step; and states as an earlier session counted them, until this one makes a step.
        self.traffic_by_operation, self._state_bytes = {}, {}
        self.skipped = 0  # steps whose gradients were not finite

    def prepare(self) -> Generator[tuple[int, int], None, None]:
        """The reference log-probabilities, where the objective needs them; yields (responses done, all).

        Computed once, before the first update, where the policy is the reference unless another was given. Kept for
        whoever compares the same responses with the same model.
        """
        if not self.objective.needs_reference:
            return
        for examples in [self.examples] * (not self.online) + ([self.held_out.examples] if self.held_out else []):
            examples.reference = yield from self._reference_of(examples)

    def _reference_of(self, examples: Examples) -> Generator[tuple[int, int], None, Reference]:
        model, layout, cache = self.policy.model, self.policy.logps.layout, self.cache
        own = nullcontext(self._opened())
        assert not self.backend.updated, "it is the reference no more"
        if self.open_reference:  # of use to nobody else
            opened, of = self.open_reference(), f"{self.mark} {layout} {model.device.type}"
            cache = self.folder / SCRATCH
        else:
            opened, of = own, described(model, self.policy.fingerprint(), layout, self.policy.autocast)
        asked = examples.responses(range(len(examples)))
        return (yield from reference_logps(*kept(cache, of), examples.corpus, asked, opened, examples.budget))

    def _opened(self) -> Opened:
        """The policy, as it is."""
        return Opened(self.backend.response_logps, self.policy.logps.layout, self.policy.model.device)

    def run(self) -> Iterator[StepMetrics]:
        """Yields after each optimizer step that was made.

        Raises TrainingError when a loss, a gradient or a weight is not finite, Interrupted after a signal and the
        checkpoint of its step.
        """
        if self.examples.reference is None:
            deque(self.prepare(), maxlen=0)
        self.made = done = self._resume()
        _, ended = self._looks(done)
        log = self._open_log(done) if ranks.is_main() else None
        coming = self.examples.batches(done)
        with signals.deferred() as received, closing(coming):
            self._received, self._saved_at = received, time.monotonic()
            while not ended and self.made < len(self.steps):
                metrics = self._step(self.made, coming)
                self.made += 1
                seen, ended = self._looks(self.made)
                if metrics:
                    metrics.metrics.update(seen)
                if metrics and log:
                    log.append([metrics.row()])
                if self.asks.due or self.asks.stop or self.made % self.config.save_steps == 0:
                    self._save(self.made)
                if metrics:
                    yield metrics
                if self.asks.stop:
                    raise signals.Interrupted(received() or signal.SIGTERM)
            if ranks.add_up(torch.tensor(float(bool(received())))):  # since the last step looked
                self._save(self.made)
                raise signals.Interrupted(received() or signal.SIGTERM)
        if (step := ranks.on_main(lambda: self.watches.leaves)) not in (None, self.made):
            self.backend.load(self.checkpoints.best(step))
        self._check_weights(self.made)
        ranks.on_main(lambda: log.flush())

    def _resume(self) -> int:
        """The steps that the newest whole checkpoint has."""
        if (path := ranks.on_main(self.checkpoints.newest)) is None:
            return 0
        progress = self.backend.load(path)
        self.skipped, self.traffic_by_operation = progress["skipped"], progress["traffic_by_operation"]
        self._state_bytes = progress["state_bytes"]
        self.watches.state = progress["watched"]
        return progress["step"]

    def _looks(self, made: int) -> tuple[dict[str, float], bool]:
        """What is seen after so many steps by who looks then, and whether training ends; on all ranks alike."""
        seen, ended = self.watches.look(made, self._opened())
        if seen and ranks.on_main(lambda: self.watches.leaves == made):
            ranks.on_main(self.checkpoints.make_room_for_best)
            self.backend.save(self.checkpoints.best(made), made, self.checkpoints.about)
        return seen, ended

    def _open_log(self, done: int) -> Journal:
        path = self.folder / LOG
        if path.exists() and path.stat().st_size and not any(self.folder.glob(CHECKPOINTS)):
            logger.warning("%s: steps were made, but no checkpoint of them is there; training begins again", path)
        log = Journal(self.folder / LOG, self.mark, lambda row: row["step"] <= done)
        if lost := done - self.skipped - log.count:
            logger.warning(
                "%s: %d of %d steps are not there any more; curves and times lack them", log.path, lost, done
            )
        return log

    def _save(self, step: int) -> None:
        self._check_weights(step)
        ranks.on_main(self.checkpoints.make_room)
        self.backend.save(self.checkpoints.path(step), step, {**self.checkpoints.about, **self._seen()})
        ranks.on_main(lambda: self.checkpoints.prune(step))
        self._saved_at = time.monotonic()

    def _seen(self) -> dict:
        """What a session that makes no step more cannot see."""
        seen = {"state_bytes": self.state_bytes(), "traffic_by_operation": self.traffic_by_operation}
        return {"skipped": self.skipped, "watched": self.watches.state, "best": self.watches.leaves, **seen}

    def _check_weights(self, step: int) -> None:
        """Raises TrainingError where the last update of a weight was too much."""
        if ranks.add_up(self.backend.exceeds.double()):
            raise TrainingError(f"step {step}: a weight is NaN, infinite or too large for its dtype after the update")

    def state_bytes(self) -> dict[str, int]:
        """Bytes of this rank's live model states by kind; gradients and moments are there once a step was made."""
        return self._state_bytes or {**self.policy.state_bytes(), **self.backend.state_bytes()}

    def _step(self, number: int, coming: Iterator[list[tuple[MicroBatch, float, Batch]]]) -> StepMetrics | None:
        """None where it was passed over. coming: of each step its micro-batches; the next ones are this one's."""
        started, learning_rate, batches = time.perf_counter(), self.backend.learning_rate, next(coming)
        bytes_before = self.traffic.bytes.copy() if self.traffic else None
        every = self.examples.micro_batches(number)  # of all ranks
        count = max(1, sum(self.examples.count(micro, self.objective.counts) for micro in every))
        totals: dict[str, Tensor] = {}
        losses: dict[MicroBatch, Tensor] = {}  # of this rank
        for place, (micro, weight, batch) in enumerate(batches):
            counted = self.examples.count(micro, self.objective.counts)
            batch = batch.to(self.policy.model.device)
            if self.objective.counts == "weights":
                batch = replace(batch, gradient_rows=counted)
            logps, reference = self._compute(batch)
            loss, metrics = self.objective(logps, reference, batch)
            share = weight * counted / count
            self.backend.backward(loss * share, last=place == len(batches) - 1)
            losses[micro] = loss.detach()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, 0) + value * share
        values: dict[str, float] = {}

        def accepts(norm: Tensor) -> bool:
            values.update(self._read(totals, norm))
            return self._are_finite(number, values, losses)

        self.backend.step(accepts)
        self._state_bytes = {}
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            return None
        if self.traffic:
            self.traffic_by_operation = dict(self.traffic.bytes - bytes_before)
            values["traffic_bytes"] = sum(self.traffic_by_operation.values())
        return StepMetrics(
            step=number + 1,
            total_steps=len(self.steps),
            epoch=(number + 1) / len(self.examples.epochs[0]),
            loss=values.pop("loss"),
            grad_norm=values.pop("grad_norm"),
            learning_rate=learning_rate,
            tokens=sum(map(self.examples.tokens, every)),
            seconds=time.perf_counter() - started,
            metrics=values,
        )

    def _read(self, totals: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
        """What the step computed, of all ranks: the one time that it waits for the device.

        With it goes what else ranks must agree on: is a checkpoint due, did a signal come, did the last update of any
        weight go too far.
        """
        sums = torch.stack([value.double() for value in totals.values()])
        due = ranks.is_main() and time.monotonic() - self._saved_at > 60 * self.config.save_minutes
        flags = torch.tensor([due, bool(self._received())]).to(sums)
        summed = ranks.add_up(torch.cat([sums, flags, self.backend.exceeds.to(sums).view(1)]))
        *numbers, due, stop, exceeds, norm = torch.cat([summed, norm.to(sums).view(1)]).tolist()
        self.asks = _Asks(due > 0, stop > 0)
        return {**dict(zip(totals, numbers, strict=True)), "grad_norm": norm, "exceeds": exceeds}

    def _are_finite(self, number: int, values: dict[str, float], losses: dict[MicroBatch, Tensor]) -> bool:
        """Whether step `number`, from 0, can be made; False for one of those that may be passed over."""
        if values.pop("exceeds"):
            self._check_weights(number)
        if math.isfinite(values["loss"] + values["grad_norm"]):
            return True
        self.skipped += 1
        where = "".join(ranks.gather(self._where({micro: float(loss) for micro, loss in losses.items()})))
        said = f"step {number + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}{where}"
        if self.skipped > self.config.skip_nonfinite_steps:
            raise TrainingError(said)
        logger.warning("%s; passed over, %d of %d", said, self.skipped, self.config.skip_nonfinite_steps)
        return False

    def _where(self, losses: dict[MicroBatch, float]) -> str:
        """Whose losses of this rank are not finite."""
        micros = [micro for micro, loss in losses.items() if not math.isfinite(loss)]
        names = [name for micro in micros for name in self.examples.names_of(micro)]
        return f"; on rank {ranks.rank()} in {', '.join(names)}" if names else ""

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities by the policy, and by the reference where the objective needs them."""
        reference = batch.reference
        if self.online and self.backend.updated:
            with self.policy.reference():
                reference = self.backend.response_logps(batch)
        logps = self.backend.response_logps(batch)
        # Before the first update the policy is the reference, whatever kernels gradients may have made it run.
        policy_is_reference = self.open_reference is None and not self.backend.updated
        return logps, logps.detach() if policy_is_reference and self.objective.needs_reference else reference
