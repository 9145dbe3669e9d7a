"""Passes over the examples of a stage, each taking the gradients of one window of the weights at the frozen base.

A pass goes through the stage's own optimizer steps, and updates nothing but the window's sums. Where scores depend on
how far a step's gradient is clipped, and no pass sees all weights, other passes over larger windows come first, which
keep squares alone. Ranks that hold the whole base divide the passes and reduce nothing; ranks that share it by ZeRO-3
go through all of them together, each with its share of every step's micro-batches and of every window's sums.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from allo_fast import ranks
from allo_fast.config import TrainConfig, UserError
from allo_fast.data.batch import Batch
from allo_fast.locating.families import Step, make_family
from allo_fast.locating.files import is_done, load_passes, passes_begun, read_piece, save_pass
from allo_fast.locating.taps import Taps
from allo_fast.locating.windows import Piece, pieces_of, windows_of
from allo_fast.method.objectives import Dpo, Npo, Sft
from allo_fast.method.optim import clip_scale
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.probe import is_sharded
from allo_fast.model.weights import held_here, named_weights, whole
from allo_fast.training.backend import learning_rates
from allo_fast.training.examples import Examples


class Sweep:
    """Scores of every weight of a model, in files in `folder`: see `stored_scores`.

    score: one of config.GRADIENT_SCORES. windows: passes for scores, at most; an earlier session's where there was one.
    clip: by config.max_grad_norm. compute: response log-probabilities; None: `logps` itself. host: sums lie in host
    memory. reference: by micro-batch, of another model than the base. Raises UserError where gradients are not finite.
    """

    def __init__(
        self,
        logps: ResponseLogps,
        examples: Examples,
        objective: Sft | Npo | Dpo,
        config: TrainConfig,
        score: str,
        folder: Path,
        *,
        windows: int = 1,
        clip: bool = True,
        host: bool = False,
        compute: Callable[[Batch], Tensor] | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ):
        self.logps, self.model, self.examples, self.objective = logps, logps.model, examples, objective
        self.config, self.folder, self.compute, self.reference = config, folder, compute or logps, reference or {}
        self.rates = learning_rates(config, len(examples.steps))
        self.family, self.score = make_family(score, config, self.rates), score
        self.sharded = is_sharded(self.model)
        self.device = torch.device("cpu") if host else self.model.device
        self.pieces = pieces_of(self.model)
        begun = ranks.on_main(lambda: passes_begun(folder, "score"))
        self.windows = windows_of(self.pieces, begun or windows)
        self.clips = clip and self.family.needs_norm
        self.state_bytes = {"base": sum(held_here(w).nbytes for w in named_weights(self.model).values())}
        self.counts = [objective.count(self._collate(micro)) for micro in range(len(examples.micro_batches))]

    @property
    def passes(self) -> int:
        return len(self._square_windows()) + len(self.windows)

    def run(self) -> Iterator[tuple[int, int]]:
        """Yields (steps done by this rank, all of its steps)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        squares = self._square_windows()
        left = {"squares": self._left("squares", squares), "score": self._left("score", self.windows)}
        done, total = 0, len(self.examples.steps) * sum(map(len, left.values()))
        taps = Taps(self.model, self.logps)
        try:
            for number in left["squares"]:
                for _ in self._squares_pass(taps, number, squares):
                    yield (done := done + 1), total
            ranks.barrier()
            norms = self._norms() if squares else None
            for number in left["score"]:
                for _ in self._score_pass(taps, number, norms):
                    yield (done := done + 1), total
            ranks.barrier()
        finally:
            taps.close()

    def _square_windows(self) -> list[list[Piece]]:
        """Where no pass for scores sees all weights: as large as their sums then are."""
        if not self.clips or len(self.windows) == 1:
            return []
        return windows_of(self.pieces, -(-len(self.windows) // (1 + self.family.states)))

    def _left(self, kind: str, windows: Sequence[Sequence[Piece]]) -> list[int]:
        """The passes that this rank has to do."""
        every = range(len(windows))
        left = ranks.on_main(lambda: [n for n in every if not is_done(self.folder, kind, n, len(windows))])
        return left if self.sharded else left[ranks.rank() :: ranks.world_size()]

    def _squares_pass(self, taps: Taps, number: int, windows: list[list[Piece]]) -> Iterator[None]:
        pieces = windows[number]
        rows: list[Tensor] = []
        with taps.open(pieces, self.device) as sums:
            for _, gradients in self._steps(pieces, sums):
                rows.append(self._squares(gradients))
                yield
        by_piece = dict(zip(pieces, torch.stack(rows).T.contiguous(), strict=True))
        self._save("squares", number, len(windows), by_piece, ranks.is_main() or not self.sharded)

    def _score_pass(self, taps: Taps, number: int, norms: Tensor | None) -> Iterator[None]:
        pieces = self.windows[number]
        shares = [piece.share(*self._place) for piece in pieces]
        states = [[torch.zeros(s.size, device=self.device) for _ in range(self.family.states)] for s in shares]
        with taps.open(pieces, self.device) as sums:
            held = sum(tensor.nbytes for tensor in [*sums, *(state for group in states for state in group)])
            self.state_bytes["accumulators"] = max(held, self.state_bytes.get("accumulators", 0))
            for step, gradients in self._steps(pieces, sums):
                norm = None
                if self.clips:
                    norm = self._squares(gradients).sum().sqrt().float() if norms is None else norms[step]
                scale = torch.ones(()) if norm is None else clip_scale(norm, self.config.max_grad_norm)
                step_settings = Step(step + 1, self.rates[step], scale.to(self.device))
                for group, gradient in zip(states, gradients, strict=True):
                    self.family.update(group, gradient, step_settings)
                yield
        scores = {share: self._scored(share, group) for share, group in zip(shares, states, strict=True)}
        self._save("score", number, len(self.windows), scores, True)

    def _steps(self, pieces: list[Piece], sums: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Per optimizer step its number, from 0, and the gradient of this rank's share of each piece."""
        for number in range(len(self.examples.steps)):
            torch._foreach_zero_(sums)
            for micro, share in self._shares(number):
                self._backward(micro, share)
            if number == 0:
                self._check_finite("gradient", zip(pieces, sums, strict=True))
            yield number, [ranks.reduce_share(total) for total in sums] if self.sharded else sums

    def _shares(self, step: int) -> list[tuple[int, float]]:
        """The micro-batches of a step that this rank computes, and their parts in the step's loss."""
        total = max(1, sum(self.counts[micro] for micro in self.examples.steps[step]))
        micros = self.examples.share(step) if self.sharded else [(micro, 1.0) for micro in self.examples.steps[step]]
        return [(micro, weight * self.counts[micro] / total) for micro, weight in micros]

    def _backward(self, micro: int, share: float) -> None:
        batch = self._collate(micro).to(self.model.device)
        logps = self.compute(batch)
        if not logps.requires_grad:  # nothing of the window is read
            return
        reference = self.reference.get(str(micro))
        reference = logps.detach() if reference is None else reference.to(logps.device)
        loss, _ = self.objective(logps, reference, batch)
        (loss * share).backward()

    def _collate(self, micro: int) -> Batch:
        return self.examples.collate(micro, self.logps.share_prompts)

    @property
    def _place(self) -> tuple[int, int]:
        """This rank's share of every piece: which of how many."""
        return (ranks.rank(), ranks.world_size()) if self.sharded else (0, 1)

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        """Of each piece, fp64 [pieces] on the CPU."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        squares = torch.stack(norms).square().cpu()
        return ranks.add_up(squares) if self.sharded else squares

    def _norms(self) -> Tensor:
        """Of every step's whole gradient, fp32 [steps]; the sum of squares that a pass over all weights would make."""
        places = load_passes(self.folder, "squares")
        squares = torch.stack([read_piece(*places[piece]) for piece in self.pieces])
        return torch.stack([row.sum() for row in squares.T.contiguous()]).sqrt().float()

    def _scored(self, piece: Piece, states: list[Tensor]) -> Tensor:
        weight = named_weights(self.model)[piece.name]

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

    def _save(self, kind: str, number: int, count: int, results: Mapping[Piece, Tensor], writes: bool) -> None:
        rank, world = self._place if kind == "score" else (0, 1)
        if writes:
            save_pass(self.folder, kind, number, count, results, rank, world)
