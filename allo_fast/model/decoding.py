"""Responses token by token, in slots: a prompt is computed once for all its responses, and who ends makes room.

    slot 0   prompt A ... response A.0          keys and values of a layer: [slots, heads, positions, dimensions];
    slot 1   prompt A ... response A.1 .        each slot is filled up to its own length, and a step adds one token to
    slot 2   prompt B . response B.0            every live one

Where a response ends, the last slot moves into its place and a waiting one enters behind it. Models whose cache is
more than that are tried and named.
"""

import inspect
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from allo_fast.config import UserError
from allo_fast.model.drawing import Response, Sampler
from allo_fast.model.probe import reads_a_part, said_by

BLOCK = 128  # positions by which slots grow
PROMPT_TOKENS = 2048  # of prompts of one length that are computed together


@dataclass
class _Step:
    """Where the tokens of this step go. at [n]: the position of each. width: positions that are read."""

    slots: Tensor
    at: Tensor
    width: int


class _Layer(DynamicLayer):
    """Keys and values of one layer in slots, `like` those of a prompt."""

    def __init__(self, like: DynamicLayer, slots: int):
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        self.keys, self.values = (_slots(tensor, slots, 0) for tensor in (like.keys, like.values))
        self.step: _Step | None = None

    def reserve(self, width: int) -> None:
        """Positions for `width`. What is not filled yet weighs nothing, which NaN would: it is zero."""
        for name in ("keys", "values"):
            filled = getattr(self, name)
            setattr(self, name, grown := _slots(filled, len(filled), width))
            grown[:, :, : filled.shape[2]] = filled

    def enter(self, prompts: DynamicLayer, rows: list[int], first: int) -> None:
        """The prompts of these rows into the slots from `first` on."""
        length = prompts.keys.shape[2]
        self.keys[first : first + len(rows), :, :length] = prompts.keys[rows]
        self.values[first : first + len(rows), :, :length] = prompts.values[rows]

    def move(self, source: int, target: int, length: int) -> None:
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        step, count = self.step, len(key_states)
        self.keys[step.slots, :, step.at] = key_states[:, :, 0]
        self.values[step.slots, :, step.at] = value_states[:, :, 0]
        return self.keys[:count, :, : step.width], self.values[:count, :, : step.width]

    def get_seq_length(self) -> int:
        return self.step.width - 1


def _slots(like: Tensor, slots: int, width: int) -> Tensor:
    return like.new_zeros(slots, like.shape[1], width, like.shape[3])


class Decoder:
    """Extends responses until each is done, `slots` of them at a time; shorter prompts first, whatever their order.

    Raises UserError where a logit is not finite.
    """

    def __init__(self, model: PreTrainedModel, sampler: Sampler, slots: int):
        self.model, self.sampler, self.slots = model, sampler, slots
        self.takes = inspect.signature(model.forward).parameters
        self.live: list[Response] = []  # by their slots
        self.layers: list[_Layer] = []
        self.entering: deque[tuple[Response, int]] = deque()  # each with its prompt's row of `computed`
        self.computed: Cache | None = None
        self.logits: Tensor | None = None  # [rows, V]

    @torch.no_grad()
    def run(self, responses: list[Response]) -> None:
        ordered = sorted(responses, key=lambda response: (len(response.prompt), response.prompt))
        waiting = deque(list(same) for _, same in groupby(ordered, key=lambda response: response.prompt))
        while self.live or self.entering or waiting:
            while len(self.live) < self.slots and (self.entering or waiting):
                if not self.entering:
                    self._compute_prompts(waiting)
                self._enter()
            if self.live:
                self._step()

    def _compute_prompts(self, waiting: deque[list[Response]]) -> None:
        """Of the next ones those of one length, which need no padding, as far as there is room for their responses."""
        group, length = [], len(waiting[0][0].prompt)
        while waiting and len(waiting[0][0].prompt) == length and len(self.entering) < self.slots - len(self.live):
            if group and (len(group) + 1) * length > PROMPT_TOKENS:
                break
            self.entering.extend((response, len(group)) for response in waiting[0])
            group.append(waiting.popleft()[0].prompt)
        ids = torch.tensor(group, device=self.model.device)
        more = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
        output = self.model(input_ids=ids, use_cache=True, **more)
        self.computed, self.logits = output.past_key_values, output.logits[:, -1]

    def _enter(self) -> None:
        first = len(self.live)
        entering = [self.entering.popleft() for _ in range(min(self.slots - first, len(self.entering)))]
        responses, rows = map(list, zip(*entering, strict=True))
        if not self.layers:
            self.layers = [_Layer(layer, self.slots) for layer in self.computed.layers]
        self._reserve(len(responses[0].prompt))
        for layer, prompts in zip(self.layers, self.computed.layers, strict=True):
            layer.enter(prompts, rows, first)
        self.live += responses
        logits = self.logits[rows]
        if not self.entering:
            self.computed = self.logits = None
        self._extend(responses, logits)

    def _step(self) -> None:
        lengths = [len(response.prompt) + len(response.tokens) - 1 for response in self.live]
        device, width = self.model.device, max(lengths) + 1
        self._reserve(width)
        at = torch.tensor(lengths, device=device)
        step = _Step(torch.arange(len(lengths), device=device), at, width)
        for layer in self.layers:
            layer.step = step
        ids = torch.tensor([response.tokens[-1:] for response in self.live], device=device)
        mask = (torch.arange(width, device=device) <= at[:, None]).long()
        more = {"position_ids": at[:, None]} if "position_ids" in self.takes else {}
        cache = Cache(layers=self.layers)
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        self._extend(self.live, output.logits[:, -1])

    def _extend(self, responses: list[Response], logits: Tensor) -> None:
        self.sampler.extend(responses, logits)
        for slot in reversed(range(len(self.live))):
            if self.sampler.is_done(self.live[slot]):
                last = self.live.pop()
                if slot < len(self.live):
                    self.live[slot] = last
                    for layer in self.layers:
                        layer.move(len(self.live), slot, len(last.prompt) + len(last.tokens))

    def _reserve(self, width: int) -> None:
        if width > self.layers[0].keys.shape[2]:
            for layer in self.layers:  # one after the other, so that only one has both
                layer.reserve(-(-width // BLOCK) * BLOCK)


@torch.no_grad()
def why_padded(model: PreTrainedModel) -> str | None:
    """Why responses of this model cannot be computed in slots; None where a trial gives what whole rows give.

    Three prompts of other lengths go into two slots. Raises UserError where a logit is not finite.
    """
    sampler, responses = Recording(type(model).__name__, 0.0, 1.0, set()), trial_responses(model, 3, 5, 9)
    try:
        ids = torch.tensor([responses[0].prompt], device=model.device)
        cached = model(input_ids=ids, use_cache=True).past_key_values
        if not isinstance(cached, DynamicCache) or {type(layer) for layer in cached.layers} != {DynamicLayer}:
            return "it caches other things than the keys and values of all tokens"
        if reads_a_part(model.config.get_text_config()):  # by their places in the slots
            return "it has layers that do not attend to everything"
        Decoder(model, sampler, 2).run(responses)
    except UserError:
        raise
    except Exception as error:  # a model may raise anything
        return f"it cannot compute rows in slots: {said_by(error)}"
    return None if all(sampler.agrees(model, response) for response in responses) else "its rows depend on each other"


def trial_responses(model: PreTrainedModel, *lengths: int) -> list[Response]:
    """To prompts of these lengths; none has a token yet. Some end before others."""
    vocabulary = model.config.get_text_config().vocab_size
    low, high = min(10, vocabulary // 3), min(1000, vocabulary)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(low, high, (length,), generator=draw).tolist() for length in lengths]
    return [Response(prompt, 4 + 3 * (number % 2)) for number, prompt in enumerate(prompts)]


@dataclass
class Recording(Sampler):
    """Remembers the logits of each response's tokens."""

    logits: dict[int, list[Tensor]] = field(default_factory=dict)

    def extend(self, responses: list[Response], logits: Tensor) -> None:
        for response, line in zip(responses, logits.float(), strict=True):
            self.logits.setdefault(id(response), []).append(line)
        super().extend(responses, logits)

    def agrees(self, model: PreTrainedModel, response: Response) -> bool:
        """Whether the whole row gives the same, to half the digits at most places: rounding can send a token to
        another expert."""
        row = torch.tensor([[*response.prompt, *response.tokens[:-1]]], device=model.device)
        whole = model(input_ids=row, use_cache=False).logits[0, len(response.prompt) :].float()
        decoded = torch.stack(self.logits[id(response)][1:])
        distances = (decoded - whole).norm(dim=-1) / whole.norm(dim=-1)
        return bool(distances.median() <= torch.finfo(model.dtype).eps ** 0.5)
