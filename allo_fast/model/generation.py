"""Responses from a model: each drawn with numbers of its own, so that a text does not depend on what runs beside it."""

import logging
from dataclasses import replace
from itertools import groupby
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.data.encoding import CUT
from allo_fast.model.decoding import Decoder, Recording, trial_responses, why_padded
from allo_fast.model.drawing import Response, Sampler, draws_of
from allo_fast.model.logps import forget_longer_rows
from allo_fast.model.probe import longest_row, said_by

logger = logging.getLogger(__name__)

_padded: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()  # why each model that was tried is
_tried: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()  # how each may be batched: see `_together`


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    end_tokens: set[int],
    *,
    max_new_tokens: int,
    seed: int = 0,
    first: int = 0,
    num_return_sequences: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    rows: int | None = None,
    sharded: bool = False,
) -> list[list[str]]:
    """Per prompt, its responses as text; temperature 0 is greedy. `seed`, a prompt's number and the response's among
    its own decide a text, to rounding; what is sampled beside it does not.

    end_tokens end a response, and so does what the model's generation configuration stops at; its other defaults play
    no part. Special tokens within a response stay in its text. first: the number of the first prompt. rows: responses
    that are computed at once; None: all. sharded: the ranks share the model, and go on until the last of them is done.
    Raises UserError where a logit is NaN or positive infinity.
    """
    stops = {*end_tokens, *stop_tokens(model)}
    sampler = Sampler(type(model).__name__, temperature, top_p, stops)

    def begun(number: int, prompt: list[int], sample: int) -> Response:
        draws = draws_of(seed, first + number, sample, max_new_tokens) if temperature else None
        return Response(prompt, max_new_tokens, draws)

    samples = range(num_return_sequences)
    responses = [[begun(number, prompt, sample) for sample in samples] for number, prompt in enumerate(prompts)]
    _extend(model, [response for same in responses for response in same], sampler, min(end_tokens), rows, sharded)
    return [[_text(tokenizer, response, stops) for response in same] for same in responses]


@torch.no_grad()
def greedy_tokens(
    model: PreTrainedModel, prompts: list[list[int]], end_tokens: set[int], max_new_tokens: int, sharded: bool = False
) -> list[list[int]]:
    """Of a response to each prompt its token ids, without what ends it, by a model that may be training."""
    stops, training = {*end_tokens, *stop_tokens(model)}, [module for module in model.modules() if module.training]
    responses = [Response(prompt, max_new_tokens) for prompt in prompts]
    for module in training:  # layers that are computed again in backward keep no keys of earlier tokens
        module.training = False
    try:
        _extend(model, responses, Sampler(type(model).__name__, 0.0, 1.0, stops), min(end_tokens), None, sharded)
    finally:
        for module in training:
            module.training = True
    return [[token for token in response.tokens if token not in stops] for response in responses]


def _extend(
    model: PreTrainedModel,
    responses: list[Response],
    sampler: Sampler,
    padding: int,
    rows: int | None,
    sharded: bool,
) -> None:
    """Until each is done."""
    rows = min(rows or len(responses), len(responses))
    forget_longer_rows(model)
    if not sharded and _in_slots(model):
        limit = longest_row(model)  # beyond it, what a row is depends on its batch
        fitting = [response for response in responses if not limit or len(response.prompt) + response.room <= limit]
        Decoder(model, sampler, rows).run(fitting)
        responses = [response for response in responses if not response.tokens]
    for batch in _batches(model, responses, rows, padding, sharded):
        _decode_batch(model, batch, sampler, padding, sharded)


def stop_tokens(model: PreTrainedModel) -> set[int]:
    """What the model's generation configuration stops at."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _in_slots(model: PreTrainedModel) -> bool:
    """What a model cannot is said once."""
    if model not in _padded:
        if _padded.setdefault(model, why_padded(model)):
            logger.warning("%s: responses in padded batches: %s", type(model).__name__, _padded[model])
    return not _padded[model]


def _batches(
    model: PreTrainedModel, responses: list[Response], rows: int, padding: int, sharded: bool
) -> list[list[Response]]:
    """Of at most `rows`, the same number on all ranks that share the model; none has rows that change each other."""
    if not responses:
        return []
    together = _together(model, padding, sharded)
    ordered = sorted(responses, key=lambda response: len(response.prompt))
    groups = [ordered]
    if together != "padded":
        groups = [list(same) for _, same in groupby(ordered, key=lambda response: len(response.prompt))]
    rows = 1 if together == "alone" else rows
    batches = [group[start : start + rows] for group in groups for start in range(0, len(group), rows)]
    missing = max(ranks.gather(len(batches))) - len(batches) if sharded else 0
    return batches + [[replace(ordered[0], tokens=[])] for _ in range(missing)]


def _together(model: PreTrainedModel, padding: int, sharded: bool) -> str:
    """Which rows of a batch are what they are alone: "padded" ones; only those of prompts of "one length"; or a row
    "alone". What is not padded is said once. Raises UserError for a model that cannot generate at all."""
    name, growing = type(model).__name__, longest_row(model) is not None

    def agree(*lengths: int) -> bool:
        recording, trial = Recording(name, 0.0, 1.0, set()), trial_responses(model, *lengths)
        try:
            _decode_batch(model, trial, recording, padding, sharded)
        except UserError:
            raise
        except Exception as error:
            why = said_by(error)
            if len(trial) == 1:
                raise UserError(f"{name}: it cannot generate: {why}") from error
            return False
        return all([recording.agrees(model, response) for response in trial])  # each, for ranks that share the model

    if model not in _tried:
        if not growing and agree(3, 5, 9):
            _tried[model] = "padded"
        elif growing or agree(5, 5, 5):
            why = "its rotary embedding changes with the longest row" if growing else "padding changes its results"
            logger.warning("%s: responses to prompts of one length in a batch: %s", name, why)
            _tried[model] = "one length"
        else:
            agree(5)
            logger.warning("%s: one response after the other: other rows change its results", name)
            _tried[model] = "alone"
    return _tried[model]


def _decode_batch(
    model: PreTrainedModel, responses: list[Response], sampler: Sampler, padding: int, sharded: bool
) -> None:
    """By Hugging Face `generate`, until the last of these rows is done; the tokens are the sampler's choice."""
    width = max(len(response.prompt) for response in responses)
    ids = [[padding] * (width - len(response.prompt)) + response.prompt for response in responses]
    mask = [[0] * (width - len(response.prompt)) + [1] * len(response.prompt) for response in responses]

    def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
        live = [row for row, response in enumerate(responses) if not sampler.is_done(response)]
        sampler.extend([responses[row] for row in live], scores[live])
        tokens = torch.tensor([[response.tokens[-1]] for response in responses], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0)

    config = GenerationConfig(
        max_new_tokens=responses[0].room, eos_token_id=sorted(sampler.stops), pad_token_id=padding
    )
    generation, model.generation_config = model.generation_config, GenerationConfig()  # whose values would fill ours
    try:
        model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([choose]),
            synced_gpus=sharded,
        )
    finally:
        model.generation_config = generation


def _text(tokenizer: PreTrainedTokenizerBase, response: Response, stops: set[int]) -> str:
    """Without the stop, or the part of a character that it was cut in. Decoded behind its prompt: alone, some
    tokenizers drop the space that it begins with."""
    stopped = response.tokens[-1] in stops
    tokens = response.tokens[:-1] if stopped else response.tokens
    text = tokenizer.decode([*response.prompt, *tokens])[len(tokenizer.decode(response.prompt)) :]
    return text if stopped else text.rstrip(CUT)
