"""Scores of weights from gradients: as the engine makes them, and from plain transformers logits in float64."""

from functools import cache
from pathlib import Path

import torch
from conftest import pair_corpus, tiny_llama
from torch import Tensor, nn
from transformers import PreTrainedModel

from allo_fast.config import TrainConfig
from allo_fast.locating.files import stored_scores
from allo_fast.locating.sweep import Sweep
from allo_fast.method.objectives import Preference
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import named_weights, size_of
from allo_fast.training.backend import learning_rates
from allo_fast.training.examples import Examples

# Three steps an epoch, the last half as long; a warm-up of one step; clipping that binds.
SETTINGS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "warmup_steps": 1,
    "max_grad_norm": 0.5,
}


def settings(**changes) -> TrainConfig:
    return TrainConfig(**SETTINGS | changes)


def make_sweep(
    model: PreTrainedModel | ResponseLogps,
    folder: Path,
    score: str = "linear",
    *,
    config: TrainConfig | None = None,
    corpus=None,
    objective=None,
    token_weights=None,
    **given,
) -> Sweep:
    config = config or settings()
    examples = Examples(corpus or pair_corpus(7), config, token_weights=token_weights)
    logps = model if isinstance(model, ResponseLogps) else ResponseLogps(model)
    return Sweep(logps, examples, objective or Preference(0.5), config, score, folder, **given)


FEW = settings(per_device_train_batch_size=2, gradient_accumulation_steps=1, num_train_epochs=1)


def few(model: PreTrainedModel | ResponseLogps, folder: Path, score: str = "linear", *, corpus=None, **given) -> Sweep:
    """Of two steps, by default with one pair in the last."""
    if corpus is None:
        corpus = pair_corpus(3)
        corpus.examples = corpus.examples[:3]
    return make_sweep(model, folder, score, config=FEW, corpus=corpus, **given)


def scores_of(sweep: Sweep) -> dict[str, Tensor]:
    """Runs it to its end; fp32 by weight, flat."""
    for _ in sweep.run():
        pass
    sizes = {name: size_of(weight) for name, weight in sweep.weights.items()}
    return {name: score.part(0, score.size) for name, score in stored_scores(sweep.folder, sizes).items()}


def swept(model: PreTrainedModel, folder: Path, score: str = "linear", **given) -> dict[str, Tensor]:
    return scores_of(make_sweep(model, folder, score, **given))


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


@cache
def step_gradients(tied: bool) -> list[dict[str, Tensor]]:
    """Of DPO's loss in every step of `SETTINGS`, float64, with two models and all logits; one pair at a time."""
    model, config = tiny_llama(tie_word_embeddings=tied).double(), settings()
    examples = Examples(pair_corpus(7), config)
    gradients = []
    for step in range(len(examples.steps)):
        numbers = [number for micro in examples.micro_batches(step) for number in micro]
        pairs = examples.rows[numbers].tolist()
        model.zero_grad()
        for chosen, rejected in pairs:
            margin = sum_logp(model, examples.corpus, chosen) - sum_logp(model, examples.corpus, rejected)
            loss = -nn.functional.logsigmoid(0.5 * (margin - margin.detach()))
            (loss / len(pairs)).backward()
        gradients.append({name: weight.grad.clone() for name, weight in named_weights(model).items()})
    return gradients


def sum_logp(model: PreTrainedModel, corpus, index: int) -> Tensor:
    response = corpus.responses[index]
    prompt, tokens = corpus.prompts[response.prompt], response.tokens
    logps = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    return logps[range(len(prompt) - 1, len(prompt) + len(tokens) - 1), tokens].sum()


def displacement(tied: bool, clip: bool, weight_decay: float = 0.0) -> dict[str, Tensor]:
    """What torch's AdamW adds up to in float64 when every step's weights are put back; flat."""
    model, config = tiny_llama(tie_word_embeddings=tied).double(), settings()
    weights = named_weights(model)
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    moved = {name: torch.zeros_like(weight) for name, weight in start.items()}
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=weight_decay)
    gradients = step_gradients(tied)
    for rate, step in zip(learning_rates(config, len(gradients)), gradients, strict=True):
        for name, weight in weights.items():
            weight.grad = step[name].clone()
        if clip:
            nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                moved[name] += weight - start[name]
                weight.copy_(start[name])
    return {name: change.view(-1) for name, change in moved.items()}
