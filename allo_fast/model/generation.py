"""Responses from a model by Hugging Face `generate`, seeded chunk by chunk."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from allo_fast.config import UserError


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    end_tokens: set[int],
    *,
    max_new_tokens: int,
    seed: int = 0,
    num_return_sequences: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    sharded: bool = False,
) -> list[list[str]]:
    """Per prompt, its responses as text; temperature 0 is greedy. The same seed and prompts give the same texts.

    end_tokens end a response, and so does what the model's generation configuration stops at; its other defaults play
    no part. Special tokens within a response stay in its text. sharded: the ranks share the model, and go on until the
    last of them is done.
    """
    stops = {*end_tokens, *stop_tokens(model)}
    finite = LogitsProcessorList([_finite(type(model).__name__)])
    settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_return_sequences,
        eos_token_id=sorted(stops),
        pad_token_id=(padding_id := min(end_tokens)),  # the tokenizer's own may lie outside the embedding
        **settings,
    )
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    rows = zip(padding, prompts, strict=True)
    ids = torch.tensor([[padding_id] * pad + prompt for pad, prompt in rows], device=model.device)
    mask = torch.arange(width, device=model.device) >= torch.tensor(padding, device=model.device)[:, None]
    torch.manual_seed(seed)
    generation, model.generation_config = model.generation_config, GenerationConfig()  # whose values would fill ours
    try:
        output = model.generate(
            ids, attention_mask=mask.long(), generation_config=config, logits_processor=finite, synced_gpus=sharded
        )
    finally:
        model.generation_config = generation
    texts = [
        _text(tokenizer, prompts[number // num_return_sequences], new, stops)
        for number, new in enumerate(output[:, width:].tolist())
    ]
    return [texts[i : i + num_return_sequences] for i in range(0, len(texts), num_return_sequences)]


def stop_tokens(model: PreTrainedModel) -> set[int]:
    """What the model's generation configuration stops at."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _finite(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that changes nothing. Raises UserError where a logit is NaN or positive infinity."""

    def look(input_ids: Tensor, scores: Tensor) -> Tensor:
        if not (scores < torch.inf).all():
            raise UserError(f"{name}: its logits are not finite")
        return scores

    return look


def _text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int], stops: set[int]) -> str:
    """Up to the first stop. Decoded behind its prompt: alone, some tokenizers drop the space that it begins with."""
    end = next((place for place, token in enumerate(new) if token in stops), len(new))
    return tokenizer.decode([*prompt, *new[:end]])[len(tokenizer.decode(prompt)) :]
