"""Batches whose row is one problem: the prompt once, then all its responses, none of which sees another.

    input_ids    [B, T]   p p p a a a b b -      position_ids   0 1 2 3 4 5 3 4 0
    segment_ids  [B, T]   0 0 0 1 1 1 2 2 -1

Token i sees token j iff they share a row, j is not after i, and segment j is 0 or i's own. A model sees the row; losses
see only [R, L]: one line per response, one column per token of it, and which of them exist.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allo_fast.data.arrays import Chunks, Lazy, Numbers, Ragged, Tuples


@dataclass(frozen=True)
class Response:
    prompt: int  # index into Corpus.prompts
    tokens: list[int]


class Responses(Lazy[Response]):
    def __init__(self, folder: Path | None = None):
        self.tokens, self._prompts = Ragged("i", folder), Numbers("i", folder)

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, response: Response) -> None:
        self.tokens.append(response.tokens)
        self._prompts.extend((response.prompt,))

    def item(self, index: int) -> Response:
        return Response(int(self.prompts[index]), self.tokens.item(index))

    @property
    def prompts(self) -> np.ndarray:
        """Of each response, int32."""
        return self._prompts.values


@dataclass
class Corpus:
    """What a stage trains on. An example is a tuple of response indices: (chosen, rejected) or (response,).

    names: of the row that each prompt came from.
    """

    prompts: Ragged = field(default_factory=lambda: Ragged("i"))
    responses: Responses = field(default_factory=Responses)
    examples: Tuples | list[tuple[int, ...]] = field(default_factory=Tuples)
    names: Ragged = field(default_factory=lambda: Ragged("B"))

    @classmethod
    def on_disk(cls, folder: Path) -> "Corpus":
        """One whose numbers lie in nameless files of `folder`, mapped into memory once they are read."""
        return cls(Ragged("i", folder), Responses(folder), Tuples(folder), Ragged("B", folder))

    def add(self, prompt: list[int], responses: Iterable[list[int]], name: str = "") -> list[int]:
        """Adds one problem; returns the indices of its responses."""
        assert prompt, "the first token of a response needs one before it"
        number, first = len(self.prompts), len(self.responses)
        self.prompts.append(prompt)
        self.names.append(name.encode())
        for tokens in responses:
            self.responses.append(Response(number, tokens))
        return list(range(first, len(self.responses)))

    def only(self, numbers: Sequence[int]) -> "Corpus":
        """With these of its examples, by their numbers."""
        examples = Tuples()
        examples += map(tuple, np.asarray(self.examples)[numbers])
        return replace(self, examples=examples)

    def names_of(self, examples: Iterable[tuple[int, ...]]) -> list[str]:
        """Of the rows that the examples came from, each once."""
        prompts = dict.fromkeys(self.responses[example[0]].prompt for example in examples)
        return [bytes(self.names[prompt]).decode() for prompt in prompts]

    @property
    def longest(self) -> int:
        """Tokens of a prompt with its response, at most."""
        return int((self.prompts.lengths[self.responses.prompts] + self.responses.tokens.lengths).max())

    def arrays(self) -> Iterator[np.ndarray]:
        """All that it holds, but for names."""
        yield from self.prompts.arrays()
        yield from self.responses.tokens.arrays()
        yield from (self.responses.prompts, np.asarray(self.examples))


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
    token_weights: Tensor | None = None  # fp32 [R, L]

    @property
    def tokens(self) -> int:
        """Tokens the model computes on, padding left out."""
        return int((self.segment_ids >= 0).sum())

    def to(self, device: torch.device | str) -> "Batch":
        held = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in held.items() if tensor is not None})

    def layout(self, flat: Tensor) -> Tensor:
        """[N] -> [R, L], zero where there is no token."""
        grid = flat.new_zeros(self.valid.numel())
        return grid.scatter(0, self.slots, flat).view(self.valid.shape)


def plan_micro_batches(corpus: Corpus, size: int, seed: int) -> Chunks:
    """`size` examples each, the last maybe fewer; problems are shuffled, the examples of one problem stay together."""
    examples = np.asarray(corpus.examples, dtype=np.int32)
    prompts, numbers = corpus.responses.prompts[examples[:, 0]], np.arange(len(examples), dtype=np.int32)
    place = np.zeros(len(corpus.prompts), dtype=np.int32)
    place[prompts[::-1]] = numbers[::-1]  # where each problem is first: the last value is the one that stays
    order = prompts[place[prompts] == numbers]
    random.Random(seed).shuffle(memoryview(order))
    place[order] = numbers[: len(order)]
    return Chunks(examples[np.argsort(place[prompts], kind="stable")], size)


def plan_steps(micro_batches: int, per_step: int, epochs: int, seed: int) -> list[Chunks]:
    """Per epoch its optimizer steps, each a list of micro-batch numbers; later epochs shuffle whole micro-batches."""
    planned = []
    for epoch in range(epochs):
        order = np.arange(micro_batches, dtype=np.int32)
        if epoch:
            random.Random(f"{seed} {epoch}").shuffle(memoryview(order))
        planned.append(Chunks(order, per_step))
    return planned


def collate(
    corpus: Corpus,
    examples: Sequence[tuple[int, ...]],
    *,
    share_prompts: bool = True,
    token_weights: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """One micro-batch on the CPU. Without `share_prompts` every response gets a row, and its prompt, of its own.

    token_weights: per response of the corpus, one number per token.
    """
    picked = {index: corpus.responses[index] for example in examples for index in example}
    responses = list(picked)
    rows: dict[int, list[int]] = {}
    for index, response in picked.items():
        rows.setdefault(response.prompt if share_prompts else len(rows), []).append(index)
    prompts = {response.prompt: corpus.prompts[response.prompt] for response in picked.values()}
    lines = {index: line for line, index in enumerate(responses)}
    longest = max(len(response.tokens) for response in picked.values())
    built = [
        _row(prompts[picked[members[0]].prompt], {index: picked[index].tokens for index in members})
        for members in rows.values()
    ]
    width = max(len(row.tokens) for row in built)
    slots = [lines[index] * longest + column for row in built for index, column in row.columns]
    valid = torch.zeros(len(responses) * longest, dtype=torch.bool)
    valid[slots] = True
    batch = Batch(
        input_ids=_pad([row.tokens for row in built], width, 0),
        position_ids=_pad([row.positions for row in built], width, 0),
        segment_ids=_pad([row.segments for row in built], width, -1),
        sources=torch.tensor([number * width + source for number, row in enumerate(built) for source in row.sources]),
        targets=torch.tensor([target for row in built for target in row.targets]),
        slots=torch.tensor(slots),
        valid=valid.view(len(responses), longest),
        responses=torch.tensor(responses),
        prompt_lengths=torch.tensor([len(prompts[response.prompt]) for response in picked.values()]),
        examples=torch.tensor([[lines[index] for index in example] for example in examples]),
    )
    if token_weights is None:
        return batch
    return replace(batch, token_weights=_pad([token_weights[index] for index in responses], longest, 0.0))


@dataclass
class _Row:
    tokens: list[int]
    positions: list[int]
    segments: list[int]
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    columns: list[tuple[int, int]] = field(default_factory=list)  # (response, its token's number)


def _row(prompt: list[int], responses: dict[int, list[int]]) -> _Row:
    row = _Row(list(prompt), list(range(len(prompt))), [0] * len(prompt))
    for segment, (index, tokens) in enumerate(responses.items(), start=1):
        start = len(row.tokens)
        row.sources += [len(prompt) - 1, *range(start, start + len(tokens) - 1)]
        row.targets += tokens
        row.columns += [(index, column) for column in range(len(tokens))]
        # The last token predicts nothing, so the model need not see it.
        row.tokens += tokens[:-1]
        row.positions += range(len(prompt), len(prompt) + len(tokens) - 1)
        row.segments += [segment] * (len(tokens) - 1)
    return row


def _pad(rows: Sequence[Sequence], width: int, value: float) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def attention_mask(batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    """[B, 1, T, T]: bool where a token may look, or additive in `dtype`. Padding sees padding: no line is empty."""
    segments = batch.segment_ids
    query, key = segments[:, :, None], segments[:, None, :]
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    allowed = (causal & ((key == 0) | (key == query)))[:, None]
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
