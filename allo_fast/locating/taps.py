"""Gradients of some of a frozen model's weights, added up as its layers run backward.

Nothing else gets one: backward stops below the lowest of these weights, and no other product is made. Of the embedding
and the head, which are a large part of a small model, only the rows that are asked for are computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

from allo_fast.locating.windows import Piece
from allo_fast.method.alias import Alias, install_reads
from allo_fast.model.logps import HeadPass, ResponseLogps
from allo_fast.model.weights import named_weights, size_of

_ALIGNED = 16  # rows of a head that kernels begin at a multiple of


class Taps:
    """Reads every weight of the model of `logps` until it is closed; none of the model's own has a gradient."""

    def __init__(self, logps: ResponseLogps):
        self._logps = logps
        self._names = {id(w): name for name, w in named_weights(logps.model.requires_grad_(False)).items()}
        self._sums: dict[str, list[tuple[Piece, Tensor]]] = {}
        self._on_read: Callable[[str], None] = lambda name: None
        head = logps.head._parameters["weight"]
        self.head, self._head_width = self._names[id(head)], getattr(head, "ds_shape", head.shape)[1]
        for module in logps.modules():
            names = [name for name, w in module._parameters.items() if id(w) in self._names]
            plain = getattr(type(module), "_without_aliases", type(module))
            looks_up = plain.forward is nn.Embedding.forward and not (module.max_norm or module.scale_grad_by_freq)
            install_reads(module, names, self._read, {"forward": self._looked_up} if looks_up else {})

    @contextmanager
    def open(self, pieces: Sequence[Piece], device: torch.device, head: bool = True) -> Iterator[list[Tensor]]:
        """Inside, a backward adds the gradient of each piece to its sum, fp32 [entries], which is zero at first.

        head: that of the head's too; else they are left to `take_head`.
        """
        sums = list(torch.zeros(sum(piece.size for piece in pieces), device=device).split([p.size for p in pieces]))
        for piece, total in zip(pieces, sums, strict=True):
            self._sums.setdefault(piece.name, []).append((piece, total))
        module, entries = self._logps.head, self._logps.head.entries
        if self.has_head:
            module.entries, module.on_logps = lambda weight: (weight, None, None), self._tap_head if head else None
        try:
            yield sums
        finally:
            self._sums.clear()
            module.entries, module.on_logps = entries, None

    @contextmanager
    def watch(self, on_read: Callable[[str], None]) -> Iterator[None]:
        """Inside, the name of every weight that is read goes to `on_read`."""
        self._on_read, before = on_read, self._on_read
        try:
            yield
        finally:
            self._on_read = before

    def close(self) -> None:
        for module in self._logps.modules():
            install_reads(module, [], self._read)

    @property
    def has_head(self) -> bool:
        """Whether some of the head is asked for."""
        return self.head in self._sums

    def take_head(self, given: HeadPass, upstream: Tensor) -> None:
        """Adds the gradients of the head's pieces, if any; upstream: that of the head's result, fp32 [N]."""
        width = self._head_width
        for piece, total in self._sums.get(self.head, ()):
            first = piece.begin // width // _ALIGNED * _ALIGNED
            rows = self._logps.head.row_gradient(given, upstream, slice(first, -(-piece.end // width)))
            total += rows.view(-1)[piece.begin - first * width : piece.end - first * width].to(total.device)

    def _tap_head(self, given: HeadPass, logps: Tensor) -> Tensor:
        return _Tap.apply(_differentiable(logps), logps, partial(self.take_head, given))

    def _read(self, weight: nn.Parameter) -> Tensor:
        name = self._names[id(weight)]
        self._on_read(name)
        if not self._is_tapped(name, weight):
            return weight
        return Alias.apply(_differentiable(weight), weight, partial(self._take, name))

    def _is_tapped(self, name: str, weight: nn.Parameter) -> bool:
        gathered = weight.numel() == size_of(weight)  # else it is asked for, as by ZeRO-3, and not computed with
        return name in self._sums and gathered and torch.is_grad_enabled()

    def _take(self, name: str, gradient: Tensor) -> None:
        flat = gradient.reshape(-1)
        for piece, total in self._sums[name]:
            total += flat[piece.begin : piece.end].to(total.device)

    @property
    def _looked_up(self) -> Callable[[nn.Embedding, Tensor], Tensor]:
        """The forward of an embedding: its rows, and behind them the sums of those that are asked for."""

        def forward(module: nn.Embedding, ids: Tensor) -> Tensor:
            weight = module._parameters["weight"]
            name = self._names[id(weight)]
            self._on_read(name)
            found = embedding(ids, weight)
            if not self._is_tapped(name, weight):
                return found
            take = partial(self._take_rows, name, ids, module.padding_idx)
            return _Tap.apply(_differentiable(found), found, take)

        return forward

    def _take_rows(self, name: str, ids: Tensor, padding: int | None, gradient: Tensor) -> None:
        """Of the rows `ids` of an embedding, of which one may be padding that does not train."""
        ids, gradient = ids.reshape(-1), gradient.flatten(0, -2)
        width = gradient.shape[1]
        for piece, total in self._sums[name]:
            first, last = piece.begin // width, -(-piece.end // width)
            inside = (
                ((ids >= first) & (ids < last) & (ids != (-1 if padding is None else padding))).nonzero().squeeze(1)
            )
            rows = torch.zeros(last - first, width, device=gradient.device)
            rows.index_add_(0, ids[inside] - first, gradient[inside].float())
            total += rows.view(-1)[piece.begin - first * width : piece.end - first * width].to(total.device)


class _Tap(torch.autograd.Function):
    """Passes through; hands the gradient that comes back to `take` too."""

    @staticmethod
    def forward(ctx, differentiable: Tensor, passed: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        ctx.take = take
        return passed.view_as(passed)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        ctx.take(gradient)
        return None, gradient if ctx.needs_input_grad[1] else None, None


def _differentiable(like: Tensor) -> Tensor:
    """What makes a result of frozen weights one that backward reaches."""
    return torch.zeros(0, device=like.device, requires_grad=True)
