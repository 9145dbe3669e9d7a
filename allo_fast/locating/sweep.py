"""Passes over the examples of a stage, each taking the gradients of one window of the weights at the frozen base.

A pass goes through the stage's own optimizer steps, and updates nothing but the window's sums. Where scores depend on
how far a step's gradient is clipped, and no pass sees all weights, other passes over larger windows come first, which
keep squares alone. Ranks that hold the whole base divide the passes and reduce nothing; ranks that share it by ZeRO-3
go through all of them together, each with its share of every step's micro-batches and of every window's sums.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from allo_fast import ranks
from allo_fast.config import TrainConfig, UserError
from allo_fast.data.batch import Batch
from allo_fast.locating.families import Step, make_family
from allo_fast.locating.files import is_done, load_passes, passes_begun, read_piece, save_pass
from allo_fast.locating.segments import Segments, find_segments
from allo_fast.locating.taps import Taps
from allo_fast.locating.windows import Piece, pieces_of, square_windows, windows_of
from allo_fast.method.objectives import Dpo, Npo, Sft
from allo_fast.method.optim import clip_scale
from allo_fast.model.logps import HeadPass, ResponseLogps
from allo_fast.model.probe import is_sharded
from allo_fast.model.weights import held_here, named_weights, whole
from allo_fast.training.backend import learning_rates
from allo_fast.training.examples import Examples

logger = logging.getLogger(__name__)

_DISK = 0.9  # of what is free, at most


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
        self.segments: Segments | None = None  # where the model runs in them
        self.state_bytes = {"base": sum(held_here(w).nbytes for w in named_weights(self.model).values())}
        self.counts = [objective.count(self._collate(micro)) for micro in range(len(examples.micro_batches))]

    @property
    def passes(self) -> int:
        return len(self._square_windows()) + len(self.windows)

    def run(self) -> Iterator[tuple[int, int]]:
        """Yields (micro-batches done by this rank, all of its own)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        squares = self._square_windows()
        left = {"squares": self._left("squares", squares), "score": self._left("score", self.windows)}
        taps = Taps(self.logps)
        done, total = 0, sum(map(len, self.examples.steps)) * sum(map(len, left.values()))
        try:
            for work in self._phases(taps, left, squares):
                for more in work:
                    done += more
                    yield min(done, total), total
                ranks.barrier()
        finally:
            taps.close()

    def _phases(self, taps: Taps, left: dict[str, list[int]], squares: list[list[Piece]]) -> Iterator[Iterator[int]]:
        """One after another, of all ranks together; each yields how many micro-batches went through a window."""
        if any(ranks.gather(any(left.values()))) and len(self.windows) > 1 and not self.sharded:
            self.segments = self._find_segments(taps)
        if self.segments:
            yield self._capture()
        yield (more for number in left["squares"] for more in self._squares_pass(taps, number, squares))
        norms = self._norms() if squares else None
        yield (more for number in left["score"] for more in self._score_pass(taps, number, norms))

    def _square_windows(self) -> list[list[Piece]]:
        """Where no pass for scores sees all weights."""
        if not self.clips or len(self.windows) == 1:
            return []
        return square_windows(self.windows, self.family.states, self._place[1])

    def _left(self, kind: str, windows: Sequence[Sequence[Piece]]) -> list[int]:
        """The passes that this rank has to do."""
        every = range(len(windows))
        left = ranks.on_main(lambda: [n for n in every if not is_done(self.folder, kind, n, len(windows))])
        return left if self.sharded else left[ranks.rank() :: ranks.world_size()]

    def _squares_pass(self, taps: Taps, number: int, windows: list[list[Piece]]) -> Iterator[int]:
        pieces = windows[number]
        rows: list[Tensor] = []
        with taps.open(pieces, self.device, head=self.segments is None) as sums:
            for step, gradients in self._steps(taps, pieces, sums):
                rows.append(self._squares(gradients))
                yield len(self.examples.steps[step])
        by_piece = dict(zip(pieces, torch.stack(rows).T.contiguous(), strict=True))
        self._save("squares", number, len(windows), by_piece, ranks.is_main() or not self.sharded)

    def _score_pass(self, taps: Taps, number: int, norms: Tensor | None) -> Iterator[int]:
        pieces = self.windows[number]
        shares = [piece.share(*self._place) for piece in pieces]
        states = [[torch.zeros(s.size, device=self.device) for _ in range(self.family.states)] for s in shares]
        yield from self._update(taps, pieces, states, norms)  # after which scores take the place of the sums
        scores = {share: self._scored(share, group) for share, group in zip(shares, states, strict=True)}
        self._save("score", number, len(self.windows), scores, True)

    def _update(
        self, taps: Taps, pieces: list[Piece], states: list[list[Tensor]], norms: Tensor | None
    ) -> Iterator[int]:
        """Takes the states of this rank's shares through all steps."""
        with taps.open(pieces, self.device, head=self.segments is None) as sums:
            held = sum(tensor.nbytes for tensor in [*sums, *(state for group in states for state in group)])
            self.state_bytes["accumulators"] = max(held, self.state_bytes.get("accumulators", 0))
            for step, gradients in self._steps(taps, pieces, sums):
                norm = None
                if self.clips:
                    norm = self._squares(gradients).sum().sqrt().float() if norms is None else norms[step]
                scale = torch.ones(()) if norm is None else clip_scale(norm, self.config.max_grad_norm)
                step_settings = Step(step + 1, self.rates[step], scale.to(self.device))
                for group, gradient in zip(states, gradients, strict=True):
                    self.family.update(group, gradient, step_settings)
                yield len(self.examples.steps[step])

    def _steps(self, taps: Taps, pieces: list[Piece], sums: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Per optimizer step its number, from 0, and the gradient of this rank's share of each piece."""
        runs = self.segments.runs([piece.name for piece in pieces]) if self.segments else None
        for number in range(len(self.examples.steps)):
            torch._foreach_zero_(sums)
            for micro, share in self._shares(number):
                self._backward(taps, pieces, micro, share, runs)
            if number == 0:
                self._check_finite("gradient", zip(pieces, sums, strict=True))
            yield number, [ranks.reduce_share(total) for total in sums] if self.sharded else sums

    def _shares(self, step: int) -> list[tuple[int, float]]:
        """The micro-batches of a step that this rank computes, and their parts in the step's loss."""
        total = max(1, sum(self.counts[micro] for micro in self.examples.steps[step]))
        micros = self.examples.share(step) if self.sharded else [(micro, 1.0) for micro in self.examples.steps[step]]
        return [(micro, weight * self.counts[micro] / total) for micro, weight in micros]

    def _backward(
        self, taps: Taps, pieces: list[Piece], micro: int, share: float, runs: list[tuple[int, int]] | None
    ) -> None:
        device = str(self.model.device)
        batch = self._collate(micro).to(device)
        loss = partial(self._loss, micro, share, batch)
        if runs is None:
            value = loss(self.compute(batch))
            if value.requires_grad:  # else nothing of the window is read
                value.backward()
            return
        with safe_open(self._captured(micro, share), "pt", device=device) as file:

            def read(name: str) -> Tensor:
                # Copied: what is computed may depend in its last bit on how memory is aligned, which a file's is not.
                return file.get_tensor(name).clone()

            if taps.head in {piece.name for piece in pieces}:
                taps.take_head(HeadPass(read("head"), batch.targets, read("lse")), read("upstream"))
            for first, last in reversed(runs):  # as one backward pass comes to them
                start = read(f"states.{first - 1}") if first else None
                end = read(f"gradients.{last}") if last < self.segments.last_stage else None
                self.segments.backward(batch, loss, (first, last), start, end)

    def _loss(self, micro: int, share: float, batch: Batch, logps: Tensor) -> Tensor:
        reference = self.reference.get(str(micro))
        reference = logps.detach() if reference is None else reference.to(logps.device)
        return self.objective(logps, reference, batch)[0] * share

    def _find_segments(self, taps: Taps) -> Segments | None:
        (micro, share), *_ = self._shares(0)
        batch = self._collate(micro).to(self.model.device)
        segments = find_segments(taps, self.logps, batch, partial(self._loss, micro, share, batch))
        return segments if segments and ranks.on_main(lambda: self._has_disk(segments)) else None

    def _has_disk(self, segments: Segments) -> bool:
        """Whether the disk holds what enters and leaves the segments; where not, passes run the whole model: said."""
        tokens = sum(self._collate(micro).input_ids.numel() for micro, _ in self._captures())
        cut_bytes = 2 * self.model.config.get_text_config().hidden_size * self.model.dtype.itemsize
        there = sum(path.stat().st_size for path in self.folder.glob("cuts-*"))
        needed, free = tokens * cut_bytes * len(self._cuts(segments)) - there, shutil.disk_usage(self.folder).free
        if needed <= _DISK * free:
            return True
        logger.warning(
            f"locating: to run layers by themselves needs {needed / 1e9:.1f} GB in {self.folder}, which has "
            f"{free / 1e9:.1f} GB left: every pass runs the whole model, which takes longer; locate.pairs limits it"
        )
        return False

    def _cuts(self, segments: Segments) -> list[int]:
        """Where the segments of any window begin and end."""
        names = [[piece.name for piece in window] for window in [*self._square_windows(), *self.windows]]
        return sorted(set().union(*(segments.cuts(segments.runs(each)) for each in names)))

    def _captures(self) -> list[tuple[int, float]]:
        return sorted({share for step in range(len(self.examples.steps)) for share in self._shares(step)})

    def _capture(self) -> Iterator[int]:
        """What enters and leaves the segments, a file for each micro-batch; ranks divide them."""
        cuts = self._cuts(self.segments)
        for micro, share in self._captures()[ranks.rank() :: ranks.world_size()]:
            path = self._captured(micro, share)
            if not path.exists():
                batch = self._collate(micro).to(self.model.device)
                loss = partial(self._loss, micro, share, batch)
                states, gradients, given, upstream = self.segments.capture(batch, loss, cuts)
                tensors = {"head": given.hidden, "lse": given.lse, "upstream": upstream}
                for kind, kept in (("states", states), ("gradients", gradients)):
                    tensors |= {f"{kind}.{cut}": tensor for cut, tensor in zip(cuts, kept, strict=True)}
                save_file(tensors, partial_path := path.with_suffix(".partial"))
                os.rename(partial_path, path)
            yield 0

    def _captured(self, micro: int, share: float) -> Path:
        """A micro-batch has another part in the loss where its step is shorter, as the last of an epoch may be."""
        return self.folder / f"cuts-{micro}-{share.hex()}.safetensors"

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
