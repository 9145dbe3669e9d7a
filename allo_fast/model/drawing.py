"""Which token comes next: the likeliest, or one drawn with a number that belongs to its response alone."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from allo_fast.config import UserError

_CANDIDATES = 64  # likeliest tokens that are looked at first; in most places they hold all of top_p


@dataclass
class Response:
    """What follows a prompt so far. room: tokens that it may have. draws: for each a number in [0, 1); none where the
    likeliest is taken."""

    prompt: list[int]
    room: int
    draws: np.ndarray | None = None
    tokens: list[int] = field(default_factory=list)


def draws_of(seed: int, number: int, sample: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) of one response to the problem `number`: whatever else is sampled, they are the same."""
    return np.random.default_rng([seed, number, sample]).random(count)


@dataclass
class Sampler:
    """temperature 0 takes the likeliest token. top_p: see `drawn`. A response ends with one of `stops`, or where it has
    no room left. name: of the model, for errors."""

    name: str
    temperature: float
    top_p: float
    stops: set[int]

    def extend(self, responses: list[Response], logits: Tensor) -> None:
        """Each response by a token; logits [B, V]. Raises UserError where a logit is NaN or positive infinity."""
        if not (logits.amax(-1) < torch.inf).all():
            raise UserError(f"{self.name}: its logits are not finite")
        if self.temperature:
            uniforms = np.array([response.draws[len(response.tokens)] for response in responses])
            numbers = drawn(logits, torch.from_numpy(uniforms).to(logits.device), self.temperature, self.top_p)
        else:
            numbers = logits.argmax(-1)
        for response, token in zip(responses, numbers.tolist(), strict=True):
            response.tokens.append(token)

    def is_done(self, response: Response) -> bool:
        return len(response.tokens) == response.room or not self.stops.isdisjoint(response.tokens[-1:])


def drawn(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Token ids [B] from logits [B, V] and uniforms [B] fp64: softmax(logits / temperature) in fp32, of which the
    likeliest tokens before whom the others sum to less than top_p.

    The draw goes through the tokens in the order of their ids: a rounding that swaps two likely ones moves it by no
    more than itself.
    """
    scaled = logits.float() / temperature
    weights, ids = _nucleus(scaled, top_p) if top_p < 1 else (scaled.softmax(-1), None)
    ends = weights.double().cumsum(-1)
    place = torch.searchsorted(ends, uniforms[:, None] * ends[:, -1:], right=True)
    place = place.clamp(max=weights.shape[-1] - 1)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def _nucleus(scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities [B, K] and ids [B, K], ascending, of the tokens that are drawn from; others among them weigh 0.

    Of equally likely tokens at the edge those with lower ids are drawn from, however many candidates other rows need.
    """
    count, total = _CANDIDATES, scaled.logsumexp(-1, keepdim=True)
    while True:
        count = min(count, scaled.shape[-1])
        top, ids = scaled.topk(count)
        weights = (top - total).exp()
        inside = weights.cumsum(-1) - weights < top_p
        least = top.masked_fill(~inside, torch.inf).amin(-1)
        if count == scaled.shape[-1] or (top[:, -1] < least).all():  # all that are as likely as the last are seen
            break
        count *= 8
    ids, order = ids.sort(-1)
    likeliest = top.gather(1, order).argsort(dim=-1, descending=True, stable=True)
    return weights.gather(1, order) * torch.zeros_like(inside).scatter_(1, likeliest, inside), ids
