"""Batches of problems: the prompt once, then all its responses, none of which sees another.

    packed, one row              p p p a a a b b q q c c c      or a row each   p p p a a a b b   q q c c c - - -
    position_ids                 0 1 2 3 4 5 3 4 0 1 2 3 4                      0 1 2 3 4 5 3 4   0 1 2 3 4 0 0 0
    segment_ids                  0 0 0 1 1 1 2 2 0 0 1 1 1                      0 0 0 1 1 1 2 2   0 0 1 1 1 -1 -1 -1

Token i sees token j iff they are of one problem, j is not after i, and segment j is 0 or i's own. A model sees the
rows; losses see only [R, L]: one line per response, one column per token of it, and which of them exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from allo_fast.data.corpus import Corpus


class Span(NamedTuple):
    """Where a problem lies among the B * T positions of its batch, and how many its parts have there."""

    begin: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.begin + self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Layout:
    """How problems become rows."""

    share_prompts: bool = True  # else every response has its prompt for itself
    packed: bool = False  # all in one row, one behind another; else a row each, padded
    multiple: int = 1  # of the positions of a packed row; the last are padding


def rows_of(corpus: Corpus, responses: np.ndarray, layout: Layout) -> tuple[int, int]:
    """How many rows `collate` makes of these responses, and how wide; of a packed row its tokens, as if each were one.

    Their product is what a model computes on, but for what a packed row is filled up with.
    """
    every, lengths = corpus.responses.prompts[responses], corpus.responses.tokens.lengths[responses] - 1
    if layout.share_prompts:
        prompts, row = np.unique(every, return_inverse=True)
    else:
        prompts, row = every, np.arange(len(every))
    widths = corpus.prompts.lengths[prompts] + np.bincount(row, lengths, len(prompts)).astype(np.int64)
    return (int(widths.sum()), 1) if layout.packed else (len(widths), int(widths.max()))


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # int64 [B, T]
    position_ids: Tensor  # int64 [B, T]; every response restarts after its prompt
    segment_ids: Tensor  # int64 [B, T]: 0 prompt, 1.. responses, -1 padding
    sources: Tensor  # int64 [N]: flat position, in B * T, of the hidden state that predicts each response token
    targets: Tensor  # int64 [N]: the token it should predict
    slots: Tensor  # int64 [N]: where its log-probability goes, flat in R * L
    valid: Tensor  # bool [R, L]
    responses: Tensor  # int64 [R]: indices into Corpus.responses
    prompt_lengths: Tensor  # int64 [R]: tokens of each response's prompt
    examples: Tensor  # int64 [E, 1 or 2]: lines of [R, L]
    spans: tuple[Span, ...]  # of each problem, or where prompts are not shared of each response
    packed: bool
    token_weights: Tensor | None = None  # fp32 [R, L]
    loss_weights: Tensor | None = None  # fp32 [E]
    reference: Tensor | None = None  # fp32 [R, L]: log-probabilities by the reference model
    gradient_rows: int | None = None  # how many of the N tokens the loss depends on, at most; None: on all

    @property
    def tokens(self) -> int:
        """Tokens the model computes on, padding left out."""
        return sum(span.end - span.begin for span in self.spans)

    @property
    def longest(self) -> int:
        """Tokens of a prompt with its response, at most."""
        return max(span.prompt + max(span.responses) + 1 for span in self.spans)

    @property
    def branches(self) -> bool:
        """Whether any prompt has several responses behind it."""
        return any(len(span.responses) > 1 for span in self.spans)

    def to(self, device: torch.device | str) -> "Batch":
        """In one copy, which on its way to a GPU nothing waits for."""
        tensors = {item.name: value for item in fields(self) if isinstance(value := getattr(self, item.name), Tensor)}
        return replace(self, **dict(zip(tensors, moved(list(tensors.values()), device), strict=True)))

    def layout(self, flat: Tensor) -> Tensor:
        """[N] -> [R, L], zero where there is no token."""
        grid = flat.new_zeros(self.valid.numel())
        return grid.scatter(0, self.slots, flat).view(self.valid.shape)


def collate(
    corpus: Corpus,
    examples: Sequence[tuple[int, ...]],
    layout: Layout = Layout(),
    *,
    token_weights: Sequence[Sequence[float]] | None = None,
    reference: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """One micro-batch on the CPU; each of its distinct responses is in it once.

    token_weights, reference: per response of the corpus, one number per token; without the first, the corpus's own.
    """
    token_weights = token_weights or corpus.weights
    picked = {index: corpus.responses[index] for example in examples for index in example}
    responses = list(picked)
    problems: dict[int, list[int]] = {}
    for index, response in picked.items():
        problems.setdefault(response.prompt if layout.share_prompts else len(problems), []).append(index)
    prompts = {response.prompt: corpus.prompts[response.prompt] for response in picked.values()}
    lines = {index: line for line, index in enumerate(responses)}
    longest = max(len(response.tokens) for response in picked.values())
    rows = [
        _row(prompts[picked[members[0]].prompt], {index: picked[index].tokens for index in members})
        for members in problems.values()
    ]
    placed = list(zip(_begins([len(row.tokens) for row in rows], layout), rows, strict=True))
    slots = [lines[index] * longest + column for row in rows for index, column in row.columns]
    valid = torch.zeros(len(responses) * longest, dtype=torch.bool)
    valid[slots] = True
    numbers = {"token_weights": token_weights, "reference": reference}
    lists = {name: [given[index] for index in responses] for name, given in numbers.items() if given is not None}
    return Batch(
        input_ids=_pad([row.tokens for row in rows], layout, 0),
        position_ids=_pad([row.positions for row in rows], layout, 0),
        segment_ids=_pad([row.segments for row in rows], layout, -1),
        sources=torch.tensor([begin + source for begin, row in placed for source in row.sources]),
        targets=torch.tensor([target for row in rows for target in row.targets]),
        slots=torch.tensor(slots),
        valid=valid.view(len(responses), longest),
        responses=torch.tensor(responses),
        prompt_lengths=torch.tensor([len(prompts[response.prompt]) for response in picked.values()]),
        examples=torch.tensor([[lines[index] for index in example] for example in examples]),
        spans=tuple(Span(begin, row.prompt, tuple(row.lengths)) for begin, row in placed),
        packed=layout.packed,
        loss_weights=_of_examples(corpus, examples),
        **{name: _grid(of_responses).float() for name, of_responses in lists.items()},
    )


def _of_examples(corpus: Corpus, examples: Sequence[tuple[int, ...]]) -> Tensor | None:
    """The weight of each."""
    if corpus.loss_weights is None:
        return None
    prompts = corpus.responses.prompts[[example[0] for example in examples]]
    return torch.from_numpy(corpus.loss_weights.values[prompts])


@dataclass
class _Row:
    prompt: int
    tokens: list[int]
    positions: list[int]
    segments: list[int]
    lengths: list[int] = field(default_factory=list)  # of responses, as far as the model sees them
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    columns: list[tuple[int, int]] = field(default_factory=list)  # (response, its token's number)


def _row(prompt: list[int], responses: dict[int, list[int]]) -> _Row:
    row = _Row(len(prompt), list(prompt), list(range(len(prompt))), [0] * len(prompt))
    for segment, (index, tokens) in enumerate(responses.items(), start=1):
        start = len(row.tokens)
        row.sources += [len(prompt) - 1, *range(start, start + len(tokens) - 1)]
        row.targets += tokens
        row.columns += [(index, column) for column in range(len(tokens))]
        # The last token predicts nothing, so the model need not see it.
        row.tokens += tokens[:-1]
        row.positions += range(len(prompt), len(prompt) + len(tokens) - 1)
        row.segments += [segment] * (len(tokens) - 1)
        row.lengths.append(len(tokens) - 1)
    return row


def _begins(lengths: list[int], layout: Layout) -> list[int]:
    """Of each row, its first flat position."""
    return [0, *accumulate(lengths[:-1])] if layout.packed else [max(lengths) * row for row in range(len(lengths))]


def _pad(rows: list[list[int]], layout: Layout, value: int) -> Tensor:
    if layout.packed:
        rows = [list(chain.from_iterable(rows))]
    multiple = layout.multiple if layout.packed else 1
    return _grid(rows, -(-max(map(len, rows)) // multiple) * multiple, value)


def _grid(rows: Sequence[Sequence[float]], width: int | None = None, value: float = 0.0) -> Tensor:
    """[rows, width], filled up with `value`; as wide as the longest where no width is given."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def moved(tensors: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """Contiguous CPU tensors on another device, by one copy out of pinned memory."""
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    aligned = [-(-tensor.nbytes // 16) * 16 for tensor in tensors]
    block = torch.empty(sum(aligned), dtype=torch.uint8, pin_memory=True)
    for part, tensor in zip(block.split(aligned), tensors, strict=True):
        part[: tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    parts = zip(block.to(device, non_blocking=True).split(aligned), tensors, strict=True)
    return [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for part, tensor in parts]


def attention_mask(batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    """[B, 1, T, T]: bool where a token may look, or additive in `dtype`; of a batch whose rows are one problem each.

    Padding sees padding: no line is empty.
    """
    segments = batch.segment_ids
    query, key = segments[:, :, None], segments[:, None, :]
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    allowed = (causal & ((key == 0) | (key == query)))[:, None]
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
