"""Reward models: sequence classifiers with one label, as TRL's RewardTrainer makes them."""

import math
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from allo_fast.config import ModelConfig, UserError
from allo_fast.data.encoding import max_positions
from allo_fast.data.prompts import Prompts
from allo_fast.data.sources import UnusableRow
from allo_fast.model.checkpoint import check_model
from allo_fast.model.loading import load_model, load_tokenizer, model_files


class RewardModel:
    """Reads prompt and response by its own tokenizer, in its chat template where it has one, as far as it can read.

    path: folder or hub id. template: of prompts that are texts, see `Prompts`. Every rank has it whole. Raises
    UserError where it cannot be loaded.
    """

    def __init__(self, path: str, config: ModelConfig, template: str | None = None):
        self.path, self.prompts = path, reward_prompts(path, template)
        self.model = load_model(path, config, auto=AutoModelForSequenceClassification).requires_grad_(False)
        self.limit = max_positions(self.model.config.get_text_config())
        for head in self.model.children():  # rounded to bfloat16, many rewards would be equal
            if isinstance(head, nn.Linear):
                head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    @torch.no_grad()
    def __call__(self, response: str, row: dict) -> float:
        """The logit of a response to the row's prompt; it has no bounds. Raises UserError for what it cannot read."""
        ids = _ids(self.path, self.prompts, response, row)
        if len(ids) > self.limit:
            ids = ids[: self.limit]
        # One by one: what pads a batch changes last bits, and which of two responses is better.
        reward = self.model(torch.tensor([ids], device=self.model.device)).logits.float().item()
        if not math.isfinite(reward):
            raise UserError(f"{row['id']}: data.scorer: {self.path}: a reward of {reward}")
        return reward


def reward_prompts(path: str, template: str | None) -> Prompts:
    """Raises UserError for a tokenizer that cannot write a conversation."""
    return Prompts(load_tokenizer(path), None, template or "{}")


def check_reward_model(path: str, template: str | None, first: dict | None) -> None:
    """Raises UserError where there is no reward model, whole and dense, or it cannot read the row `first`; loads no
    weights."""
    try:
        check_model(path, AutoModelForSequenceClassification)
        prompts = reward_prompts(path, template)
    except UserError as error:
        raise UserError(f"data.scorer: {error}") from None
    if first:
        _ids(path, prompts, "a", first)


def reward_model_files(path: str) -> dict[str, Path]:
    """As `model_files`."""
    return model_files(path, AutoModelForSequenceClassification)


def _ids(path: str, prompts: Prompts, response: str, row: dict) -> list[int]:
    try:
        return prompts.encode_whole(row["prompt"], response, row["tools"])
    except UnusableRow as error:
        raise UserError(f"{row['id']}: data.scorer: {path}: {error}") from None
