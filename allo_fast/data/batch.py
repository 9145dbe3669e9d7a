"""Batches whose row is one problem: the prompt once, then all its responses, none of which sees another.

    input_ids    [B, T]   p p p a a a b b -      position_ids   0 1 2 3 4 5 3 4 0
    segment_ids  [B, T]   0 0 0 1 1 1 2 2 -1

Token i sees token j iff they share a row, j is not after i, and segment j is 0 or i's own. A model sees the row; losses
see only [R, L]: one line per response, one column per token of it, and which of them exist.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Response:
    prompt: int  # index into Corpus.prompts
    tokens: list[int]


@dataclass
class Corpus:
    """What a stage trains on. An example is a tuple of response indices: (chosen, rejected) or (response,)."""

    prompts: list[list[int]] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    examples: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, prompt: list[int], responses: Iterable[list[int]]) -> list[int]:
        """Adds one problem; returns the indices of its responses."""
        assert prompt, "the first token of a response needs one before it"
        self.prompts.append(prompt)
        first = len(self.responses)
        self.responses += [Response(len(self.prompts) - 1, tokens) for tokens in responses]
        return list(range(first, len(self.responses)))


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


def plan_micro_batches(corpus: Corpus, size: int, seed: int) -> list[list[tuple[int, ...]]]:
    """`size` examples each, the last maybe fewer; problems are shuffled, the examples of one problem stay together."""
    by_prompt: dict[int, list[tuple[int, ...]]] = {}
    for example in corpus.examples:
        by_prompt.setdefault(corpus.responses[example[0]].prompt, []).append(example)
    order = list(by_prompt)
    random.Random(seed).shuffle(order)
    examples = [example for prompt in order for example in by_prompt[prompt]]
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def plan_steps(micro_batches: int, per_step: int, epochs: int, seed: int) -> list[list[list[int]]]:
    """Per epoch its optimizer steps, each a list of micro-batch numbers; later epochs shuffle whole micro-batches."""
    planned = []
    for epoch in range(epochs):
        order = list(range(micro_batches))
        if epoch:
            random.Random(seed + epoch).shuffle(order)
        planned.append([order[i : i + per_step] for i in range(0, micro_batches, per_step)])
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
    responses = list(dict.fromkeys(index for example in examples for index in example))
    rows: dict[int, list[int]] = {}
    for index in responses:
        rows.setdefault(corpus.responses[index].prompt if share_prompts else len(rows), []).append(index)
    lines = {index: line for line, index in enumerate(responses)}
    longest = max(len(corpus.responses[index].tokens) for index in responses)
    built = [_row(corpus, members) for members in rows.values()]
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
        prompt_lengths=torch.tensor([len(corpus.prompts[corpus.responses[index].prompt]) for index in responses]),
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


def _row(corpus: Corpus, members: list[int]) -> _Row:
    prompt = corpus.prompts[corpus.responses[members[0]].prompt]
    row = _Row(list(prompt), list(range(len(prompt))), [0] * len(prompt))
    for segment, index in enumerate(members, start=1):
        tokens, start = corpus.responses[index].tokens, len(row.tokens)
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
