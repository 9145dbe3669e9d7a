"""Responses from a model: each drawn with numbers of its own, so that a text does not depend on what runs beside it."""

import logging
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from allo_fast.model.decoding import Decoder, why_padded
from allo_fast.model.drawing import Response, Sampler, draws_of
from allo_fast.model.probe import longest_row

logger = logging.getLogger(__name__)

_padded: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()  # why each model that was tried is


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
    every = [response for same in responses for response in same]
    rows = min(rows or len(every), len(every))
    if not sharded and _in_slots(model, max(map(len, prompts)) + max_new_tokens):
        Decoder(model, sampler, rows).run(every)
    else:
        every.sort(key=lambda response: len(response.prompt))
        for start in range(0, len(every), rows):
            _decode_padded(model, every[start : start + rows], sampler, min(end_tokens), sharded)
    return [[_text(tokenizer, response, stops) for response in same] for same in responses]


def stop_tokens(model: PreTrainedModel) -> set[int]:
    """What the model's generation configuration stops at."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _in_slots(model: PreTrainedModel, longest: int) -> bool:
    """What a model cannot is said once. longest: tokens of a row."""
    if model not in _padded:
        if _padded.setdefault(model, why_padded(model)):
            logger.warning("%s: responses in padded batches: %s", type(model).__name__, _padded[model])
    limit = longest_row(model)  # beyond it, what a row is depends on its batch
    return not _padded[model] and (limit is None or longest <= limit)


def _decode_padded(
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
    """Without the stop. Decoded behind its prompt: alone, some tokenizers drop the space that it begins with."""
    tokens = response.tokens[:-1] if response.tokens[-1] in stops else response.tokens
    return tokenizer.decode([*response.prompt, *tokens])[len(tokenizer.decode(response.prompt)) :]
