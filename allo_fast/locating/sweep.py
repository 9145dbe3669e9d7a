"""Passes over the examples of a stage, each taking the gradients of one window of the weights at the frozen base.

A pass goes through the stage's own optimizer steps, and updates nothing but the window's sums. Where scores depend on
how far a step's gradient is clipped, and no pass sees all weights, other passes over larger windows come first, which
keep squares alone. Ranks that hold the whole base divide the passes and reduce nothing; ranks that share it by ZeRO-3
go through all of them together, each with its share of every step's micro-batches and of every window's sums.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from allo_fast import ranks
from allo_fast.config import TrainConfig, UserError
from allo_fast.data.batch import Batch
from allo_fast.locating.captured import Captured
from allo_fast.locating.families import Step, make_family
from allo_fast.locating.files import (
    finished,
    load_passes,
    most_held,
    plan_windows,
    planned_windows,
    read_piece,
    save_pass,
)
from allo_fast.locating.losses import Losses
from allo_fast.locating.segments import find_segments
from allo_fast.locating.taps import Taps
from allo_fast.locating.windows import Piece, largest_of, pieces_of, square_windows, windows_of
from allo_fast.method.objectives import Npo, Preference, Sft
from allo_fast.method.optim import clip_scale
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import held_here, is_sharded, named_weights, whole
from allo_fast.training.backend import learning_rates
from allo_fast.training.examples import Examples
from allo_fast.training.steps import MicroBatch


class Sweep:
    """Scores of every weight of a model, in files in `folder`: see `stored_scores`.

    score: one of config.GRADIENT_SCORES. windows: passes for scores, at most; an earlier session's where there was one.
    clip: by config.max_grad_norm. compute: response log-probabilities; None: `logps` itself. host: sums lie in host
    memory. mark: as in `locating.files`. Raises UserError where gradients are not finite.
    """

    def __init__(
        self,
        logps: ResponseLogps,
        examples: Examples,
        objective: Sft | Npo | Preference,
        config: TrainConfig,
        score: str,
        folder: Path,
        *,
        windows: int = 1,
        clip: bool = True,
        host: bool = False,
        compute: Callable[[Batch], Tensor] | None = None,
        mark: str = "",
    ):
        self.logps, self.model, self.compute = logps, logps.model, compute or logps
        self.config, self.folder, self.mark, self.steps = config, folder, mark, examples.steps
        self.rates = learning_rates(config, len(examples.steps))
        self.family, self.score = make_family(score, config, self.rates), score
        self.sharded = is_sharded(self.model)
        self.losses = Losses(logps, examples, objective, divided=self.sharded)
        self.device = torch.device("cpu") if host else self.model.device
        self.pieces, self.weights = pieces_of(self.model), named_weights(self.model)
        self.windows = windows_of(self.pieces, ranks.on_main(lambda: planned_windows(folder, mark)) or windows)
        self.clips = clip and self.family.needs_norm
        self.square_windows = self._square_windows()
        self.captured: Captured | None = None  # where the model runs in segments
        self.state_bytes = {"base": sum(held_here(weight).nbytes for weight in self.weights.values())}

    @property
    def passes(self) -> int:
        return len(self.square_windows) + len(self.windows)

    def run(self) -> Iterator[tuple[int, int]]:
        """Yields (micro-batches done by this rank, all of its own), of every pass and of what is captured before."""
        ranks.on_main(lambda: plan_windows(self.folder, len(self.windows), self.mark))
        left = {
            "squares": self._left(self._squares_kind, self.square_windows),
            "score": self._left("score", self.windows),
        }
        if any(ranks.gather(any(left.values()))):
            yield from self._run(left)
        self.state_bytes["accumulators"] = ranks.on_main(lambda: most_held(self.folder, "score", self.mark))

    def _run(self, left: dict[str, list[int]]) -> Iterator[tuple[int, int]]:
        self.losses.check(self.compute, self.score)
        taps = Taps(self.logps)
        try:
            if len(self.windows) > 1 and not self.sharded:
                self.captured = self._find_segments(taps)
            micros = sum(len(self.losses.step(number)) for number in range(len(self.steps)))
            done, total = 0, micros * sum(map(len, left.values()))
            total += len(self.captured.own) if self.captured else 0
            for work in self._phases(taps, left):
                for more in work:
                    done += more
                    yield done, total
                ranks.barrier()
        finally:
            taps.close()

    def _phases(self, taps: Taps, left: dict[str, list[int]]) -> Iterator[Iterator[int]]:
        """One after another, of all ranks together; each yields how many micro-batches it is further."""
        if self.captured:
            yield (1 for _ in self.captured.capture())
        yield (more for number in left["squares"] for more in self._squares_pass(taps, number))
        norms = self._norms() if self.square_windows else None
        yield (more for number in left["score"] for more in self._score_pass(taps, number, norms))

    def _square_windows(self) -> list[list[Piece]]:
        """Where no pass for scores sees all weights."""
        if not self.clips or len(self.windows) == 1:
            return []
        return square_windows(self.windows, self.family.states, self._place[1])

    @property
    def _squares_kind(self) -> str:
        """Another number of ranks may divide them otherwise."""
        return f"squares-of-{largest_of(self.square_windows)}"

    def _left(self, kind: str, windows: Sequence[Sequence[Piece]]) -> list[int]:
        """The passes that this rank has to do."""
        done = ranks.on_main(lambda: set(finished(self.folder, kind, self.mark)))
        left = [number for number in range(len(windows)) if number not in done]
        return left if self.sharded else left[ranks.rank() :: ranks.world_size()]

    def _squares_pass(self, taps: Taps, number: int) -> Iterator[int]:
        pieces = self.square_windows[number]
        rows: list[Tensor] = []
        with taps.open(pieces, self.device, head=self.captured is None) as sums:
            for step, gradients in self._steps(taps, pieces, sums):
                rows.append(self._squares(gradients))
                yield len(self.losses.step(step))
        by_piece = dict(zip(pieces, torch.stack(rows).T.contiguous(), strict=True))
        if ranks.is_main() or not self.sharded:
            save_pass(self.folder, self._squares_kind, number, by_piece, mark=self.mark)

    def _score_pass(self, taps: Taps, number: int, norms: list[Tensor] | None) -> Iterator[int]:
        pieces = self.windows[number]
        shares = [piece.share(*self._place) for piece in pieces]
        states = [[torch.zeros(s.size, device=self.device) for _ in range(self.family.states)] for s in shares]
        held = yield from self._update(taps, pieces, states, norms)  # after which scores take the place of the sums
        scores = {share: self._scored(share, group) for share, group in zip(shares, states, strict=True)}
        save_pass(self.folder, "score", number, scores, *self._place, held=held, mark=self.mark)

    def _update(
        self, taps: Taps, pieces: list[Piece], states: list[list[Tensor]], norms: list[Tensor] | None
    ) -> Generator[int, None, int]:
        """Takes the states of this rank's shares through all steps; the bytes that are held meanwhile."""
        with taps.open(pieces, self.device, head=self.captured is None) as sums:
            held = sum(tensor.nbytes for tensor in [*sums, *(state for group in states for state in group)])
            for step, gradients in self._steps(taps, pieces, sums):
                scale = self._scale(gradients, norms[step] if norms else None).to(self.device)
                step_settings = Step(step + 1, self.rates[step], scale)
                for group, gradient in zip(states, gradients, strict=True):
                    self.family.update(group, gradient, step_settings)
                yield len(self.losses.step(step))
        return held

    def _scale(self, gradients: list[Tensor], norm: Tensor | None) -> Tensor:
        """Of a step. norm: of its whole gradient; None: these are the whole."""
        if not self.clips:
            return torch.ones(())
        norm = self._squares(gradients).sum().sqrt().float() if norm is None else norm
        return clip_scale(norm, self.config.max_grad_norm)

    def _steps(self, taps: Taps, pieces: list[Piece], sums: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Per optimizer step its number, from 0, and the gradient of this rank's share of each piece."""
        runs = self.captured.segments.runs([piece.name for piece in pieces]) if self.captured else None
        for number in range(len(self.steps)):
            torch._foreach_zero_(sums)
            for part in self.losses.step(number):
                if runs is None:
                    self._backward(*part)
                else:
                    self.captured.backward(*part, runs, taps)
            if number == 0:
                self._check_finite("gradient", zip(pieces, sums, strict=True))
            yield number, [ranks.reduce_share(total) for total in sums] if self.sharded else sums

    def _backward(self, micro: MicroBatch, share: float) -> None:
        batch, loss = self.losses.of(micro, share)
        value = loss(self.compute(batch))
        if value.requires_grad:  # else nothing of the window is read
            value.backward()

    def _find_segments(self, taps: Taps) -> Captured | None:
        """The model's, where on every rank it has some, and there is room for what enters and leaves them."""
        reserved = 4 * sum(piece.size for piece in self.pieces)  # scores
        captured, segments = None, find_segments(taps, self.logps, *self.losses.of(*self.losses.step(0)[0]))
        if segments:
            names = [[piece.name for piece in window] for window in [*self.square_windows, *self.windows]]
            cuts = set().union(*(segments.cuts(segments.runs(each)) for each in names))
            captured = Captured(segments, sorted(cuts), self.losses, self.folder, self.mark) if cuts else None
        return captured if all(ranks.gather(captured and captured.has_room(reserved))) else None

    @property
    def _place(self) -> tuple[int, int]:
        """This rank's share of every piece: which of how many."""
        return (ranks.rank(), ranks.world_size()) if self.sharded else (0, 1)

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        """Of each piece, fp64 [pieces] on the CPU."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        squares = torch.stack(norms).square().cpu()
        return ranks.add_up(squares) if self.sharded else squares

    def _norms(self) -> list[Tensor]:
        """Of every step's whole gradient, 0-d fp32; the sum of squares that a pass over all weights would make."""
        places = load_passes(self.folder, self._squares_kind, self.mark)
        squares = torch.stack([read_piece(*places[piece]) for piece in self.pieces])
        return [row.sum().sqrt().float() for row in squares.T.contiguous()]

    def _scored(self, piece: Piece, states: list[Tensor]) -> Tensor:
        weight = self.weights[piece.name]

        def base() -> Tensor:
            with whole(weight):
                return weight.detach().view(-1)[piece.begin : piece.end].to(self.device)

        score = self.family.score(states, base)
        self._check_finite("score", [(piece, score)])
        return score

    def _check_finite(self, what: str, tensors: Iterable[tuple[Piece, Tensor]]) -> None:
        for piece, tensor in tensors:
            if not tensor.isfinite().all():
                raise UserError(f"locate.score: {self.score}: the {what} of {piece.name} is not finite")
