"""Reward models: sequence classifiers with one label, as TRL's RewardTrainer makes them."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from allo_fast.config import ModelConfig, UserError
from allo_fast.data.encoding import max_positions
from allo_fast.data.prompts import Prompts
from allo_fast.data.sources import UnusableRow
from allo_fast.model.checkpoint import check_model
from allo_fast.model.loading import load_model, load_tokenizer, model_files


class RewardModel:
    """Reads prompt and response by its own tokenizer, in its chat template where it has one.

    path: folder or hub id. template: of prompts that are texts, see `Prompts`. Every rank has it whole. Raises
    UserError where it cannot be loaded.
    """

    def __init__(self, path: str, config: ModelConfig, template: str | None = None):
        self.path, self.prompts = path, reward_prompts(path, template)
        self.model = load_model(path, config, auto=AutoModelForSequenceClassification).requires_grad_(False)
        self.limit = max_positions(self.model.config.get_text_config())

    @torch.no_grad()
    def __call__(self, response: str, row: dict) -> float:
        """The logit of a response to the row's prompt; it has no bounds. Raises UserError for what it cannot read."""
        try:
            prompt, (ids,) = self.prompts.encode(row["prompt"], [response], row["tools"])
            if (length := len(prompt) + len(ids)) > self.limit:
                raise UnusableRow(f"{length} tokens, it reads {self.limit}")
        except UnusableRow as error:
            raise UserError(f"{row['id']}: data.scorer: {self.path}: {error}") from None
        # One by one: what pads a batch changes last bits, and which of two responses is better.
        reward = self.model(torch.tensor([[*prompt, *ids]], device=self.model.device)).logits.float().item()
        if not math.isfinite(reward):
            raise UserError(f"{row['id']}: data.scorer: {self.path}: a reward of {reward}")
        return reward


def reward_prompts(path: str, template: str | None) -> Prompts:
    """Raises UserError for a tokenizer that cannot write a conversation."""
    return Prompts(load_tokenizer(path), None, template or "{}")


def check_reward_model(path: str, template: str | None) -> None:
    """Raises UserError where there is no reward model, whole and dense; loads no weights."""
    try:
        check_model(path, AutoModelForSequenceClassification)
        reward_prompts(path, template)
    except UserError as error:
        raise UserError(f"data.scorer: {error}") from None


def reward_model_files(path: str) -> dict[str, Path]:
    """As `model_files`."""
    return model_files(path, AutoModelForSequenceClassification)
