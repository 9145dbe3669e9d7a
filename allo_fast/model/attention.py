"""Attention within packed rows: several problems one behind another, without a mask of [T, T].

On a GPU by FlexAttention, whose block mask is made from where problems and responses begin. On a CPU, and for heads
that FlexAttention's matrix products are too small for, piece by piece, each one call of scaled_dot_product_attention: a
prompt with its first response, causal; every further response against the prompt and itself; or small problems of about
the same length, stacked and masked.

`PACKED` is an attention implementation of transformers: sdpa, but for what comes with a `Packing`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from allo_fast.data.batch import Batch, Layout, Span

PACKED = "allo_packed"
BLOCK = 128  # positions of FlexAttention's blocks, of which a packed row on a GPU is a multiple
_LEAST = 16  # numbers of a head that FlexAttention takes at least
_CALL = 1_500_000  # entries of q k^T, times heads and their size, that take as long on a CPU as one call more


@dataclass(frozen=True)
class Stretch:
    """Consecutive queries, and the ranges of keys that they see: all by `mask` [queries, keys], or causally."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None = None


@dataclass(frozen=True)
class Stack:
    """Problems side by side: positions [n, t], filled up with the first; mask [n, 1, t, t]; places, in n * t, of each
    that is none of those that fill up."""

    positions: Tensor
    mask: Tensor
    places: Tensor


class Packing:
    """How the tokens of one packed batch see each other."""

    def __init__(self, batch: Batch):
        self.spans, self.segments = batch.spans, batch.segment_ids[0]
        self._pieces: dict[int, tuple[list[Stretch | Stack], Tensor | None]] = {}

    def pieces(self, size: int) -> tuple[list[Stretch | Stack], Tensor | None]:
        """And where in their results, one after another, each position is; None: in order.

        size: of all query heads together, which says when calls are worth their time.
        """
        if size not in self._pieces:
            self._pieces[size] = self._cut(_CALL // size)
        return self._pieces[size]

    def _cut(self, call: int) -> tuple[list[Stretch | Stack], Tensor | None]:
        end = self.spans[-1].end
        padding = [Span(end, len(self.segments) - end, ())] if end < len(self.segments) else []
        pieces: list[Stretch | Stack] = []
        small: list[Span] = []
        for span in [*self.spans, *padding]:
            area = (span.end - span.begin) ** 2
            if area > call and (len(span.responses) < 2 or _area_of_calls(span, call) < area):
                pieces += self._stretches(span)
            else:
                small.append(span)
        pieces += [self._stack(spans) for spans in _stacks(small, call)]
        if not small:
            return pieces, None
        positions = [_numbers(piece, self.segments.device) for piece in pieces]
        return pieces, torch.cat(positions).argsort()

    def _stretches(self, span: Span) -> Iterator[Stretch]:
        prompt = slice(span.begin, span.begin + span.prompt)
        begin = prompt.stop + (span.responses[0] if span.responses else 0)
        yield Stretch(slice(span.begin, begin), (slice(span.begin, begin),))
        for length in filter(None, span.responses[1:]):
            own = slice(begin, begin + length)
            mask = torch.ones(length, span.prompt + length, dtype=torch.bool, device=self.segments.device)
            yield Stretch(own, (prompt, own), mask.tril(span.prompt))
            begin += length

    def _stack(self, spans: list[Span]) -> Stack:
        device = self.segments.device
        begins, lengths = torch.tensor([(span.begin, span.end - span.begin) for span in spans]).T
        columns = torch.arange(max(span.end - span.begin for span in spans))
        inside = columns < lengths[:, None]
        positions = torch.where(inside, begins[:, None] + columns, begins[:, None]).to(device)
        segments = torch.where(inside.to(device), self.segments[positions], -2)
        query, key = segments[:, None, :, None], segments[:, None, None]
        return Stack(positions, ((key == 0) | (key == query)).tril(), inside.view(-1).nonzero().squeeze(1).to(device))

    @cached_property
    def block_mask(self) -> BlockMask:
        """For FlexAttention; made on the host, [T / BLOCK, T / BLOCK] at most."""
        device, length = self.segments.device, len(self.segments)
        problems, segments = _numbered(self.spans, length)
        some, full = _block_kinds(problems, segments, BLOCK)
        of_problem = torch.from_numpy(problems).to(device, non_blocking=True)
        of_segment = self.segments

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            shared = (of_segment[key] <= 0) | (of_segment[key] == of_segment[query])  # -1 is padding, a problem too
            return (query >= key) & (of_problem[key] == of_problem[query]) & shared

        partial, whole = (_as_blocks(kind, device) for kind in (some & ~full, full))
        return BlockMask.from_kv_blocks(*partial, *whole, BLOCK, sees, (length, length))


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention layers call: query, key, value [B, heads, T, size] -> [B, T, heads, size].

    packing: None where the rows are not packed, and this is sdpa.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.is_cuda and min(query.shape[3], value.shape[3]) >= _LEAST:
        return flex_attention_forward(module, query, key, value, packing.block_mask, **kwargs)
    pieces, order = packing.pieces(query.shape[1] * query.shape[3])
    parts = [_attend(piece, module, query, key, value, kwargs) for piece in pieces]
    states = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return states if order is None else states.index_select(1, order), None


def _attend(
    piece: Stretch | Stack, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, given: dict
) -> Tensor:
    """[1, positions of the piece, heads, size]."""
    if isinstance(piece, Stretch):
        keys, values = (_taken(tensor, piece.keys) for tensor in (key, value))
        mask = None if piece.mask is None else piece.mask[None, None]
        given = given | {"is_causal": mask is None}
        return sdpa_attention_forward(module, query[:, :, piece.queries], keys, values, mask, **given)[0]
    query, key, value = (tensor[0][:, piece.positions].transpose(0, 1) for tensor in (query, key, value))
    states, _ = sdpa_attention_forward(module, query, key, value, piece.mask, **given | {"is_causal": False})
    return states.flatten(0, 1).index_select(0, piece.places)[None]


AttentionInterface.register(PACKED, packed_attention_forward)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def install(model: PreTrainedModel) -> Layout | None:
    """How rows may be packed for the model, if at all. The layers of sdpa, if they look theirs up, now call
    `packed_attention_forward`; flash-attention keeps apart what begins at position 0, which no shared prompt does."""
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(PACKED)
    shares = config._attn_implementation == PACKED
    multiple = BLOCK if shares and model.device.type == "cuda" else 1
    return Layout(shares, True, multiple) if shares or is_flash_attention_requested(config) else None


def uninstall(model: PreTrainedModel) -> None:
    """Layers call sdpa by themselves again."""
    if model.config.get_text_config()._attn_implementation == PACKED:
        model.set_attn_implementation("sdpa")


def inputs(batch: Batch, model: PreTrainedModel) -> dict:
    """What it takes beside the tokens of a packed batch."""
    if model.config.get_text_config()._attn_implementation != PACKED:
        return {"position_ids": batch.position_ids}
    # In four dimensions models hand it on as it is, and make none of their own.
    mask = batch.segment_ids.new_zeros((), dtype=torch.bool).expand(1, 1, *2 * batch.input_ids.shape[1:])
    return {"attention_mask": mask, "position_ids": batch.position_ids, "packing": Packing(batch)}


def _taken(tensor: Tensor, ranges: Sequence[slice]) -> Tensor:
    parts = [tensor[:, :, each] for each in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _stacks(spans: Sequence[Span], call: int) -> Iterator[list[Span]]:
    """Of about the same length: what filling up adds to a problem is less than a call of its own."""
    stack: list[Span] = []
    for span in sorted(spans, key=lambda span: span.begin - span.end):
        if stack and (stack[0].end - stack[0].begin) ** 2 > (span.end - span.begin) ** 2 + call:
            yield stack
            stack = []
        stack.append(span)
    if stack:
        yield stack


def _numbers(piece: Stretch | Stack, device: torch.device) -> Tensor:
    """The positions that its result has, one after another."""
    if isinstance(piece, Stretch):
        return torch.arange(piece.queries.start, piece.queries.stop, device=device)
    return piece.positions.flatten()[piece.places]


def _area_of_calls(span: Span, call: int) -> int:
    """Entries of q k^T that the calls of one problem compute, and what the calls after the first take beside."""
    first, *others = span.responses
    return (span.prompt + first) ** 2 + sum(n * (span.prompt + n) + call for n in filter(None, others))


def _numbered(spans: Sequence[Span], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each position its problem and segment, int32 [length]; padding is a problem of its own, segment 0."""
    problems, segments = np.full(length, len(spans), np.int32), np.zeros(length, np.int32)
    for number, span in enumerate(spans):
        problems[span.begin : span.end] = number
        lengths = (span.prompt, *span.responses)
        segments[span.begin : span.end] = np.repeat(np.arange(len(lengths)), lengths)
    return problems, segments


def _block_kinds(problems: np.ndarray, segments: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """bool [query blocks, key blocks]: does any query see any key, does every query see every key.

    Numbers only rise along a row, so that a block is known by its ends: an earlier block of keys has tokens of the
    queries' first problem at most, and of these the last ones.
    """
    begins = np.arange(0, len(problems), size)
    first_problem, last_problem = problems[begins], problems[begins + size - 1]
    first_segment, last_segment = segments[begins], segments[begins + size - 1]
    # Of each block's last problem, the first segment in the block that is not its prompt's, or its last.
    starts = np.maximum(begins, np.searchsorted(problems, last_problem))
    has_prompt = segments[starts] == 0
    first_response = np.array(
        [next((s for s in segments[b : b + size] if s), 0) for b in starts.tolist()], dtype=segments.dtype
    )
    query, key = np.arange(len(begins))[:, None], np.arange(len(begins))[None]
    earlier, problem = key < query, first_problem[:, None] == last_problem
    some = earlier & problem & (has_prompt | (first_segment[:, None] == last_segment))
    one_problem = first_problem == last_problem
    one_segment = one_problem & (first_segment == last_segment)
    prompt_alone = last_segment == 0
    one_response = (first_response == last_segment) & one_segment[:, None] & (first_segment[:, None] == last_segment)
    full = earlier & problem & one_problem[:, None] & one_problem & (prompt_alone | one_response)
    return some | (query == key), full


def _as_blocks(kind: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 [1, 1, blocks] how many of the key blocks, and [1, 1, blocks, blocks] which, those that count first."""
    counts, order = kind.sum(1), np.argsort(~kind, axis=1, kind="stable")
    numbers = (torch.from_numpy(part.astype(np.int32)).to(device, non_blocking=True) for part in (counts, order))
    counts, order = numbers
    return counts[None, None], order[None, None]
