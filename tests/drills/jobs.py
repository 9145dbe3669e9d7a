"""Other jobs than the main one, of preference pairs, with and without a chat template; and their models."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tests.drills.run import CONFIG
from tests.tiny import byte_level, family

PREFERENCES = """
name: drill
output_dir: runs
rivals: [dpo]
model: {name_or_path: base, dtype: float32}
data: {train: train.jsonl, test: test.jsonl, format: preference, max_prompt_tokens: 300, max_response_tokens: 300}
warmup: {learning_rate: 1e-4, per_device_train_batch_size: 2, gradient_accumulation_steps: 1, save_steps: 2}
locate: {windows: 2}
forget: {learning_rate: 1e-3, threshold: mean, per_device_train_batch_size: 2, gradient_accumulation_steps: 1}
learn:
  {learning_rate: 1e-3, per_device_train_batch_size: 2, gradient_accumulation_steps: 1, ratio: 0.1, save_steps: 2,
   num_train_epochs: 2}
evaluate: {batch_size: 4}
"""


def write_model(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 1024, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ignore_case(folder: Path) -> None:
    """Its tokenizer: texts that differ have the same tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}
    path.write_text(json.dumps(content))


def pair(number: int, **changes: object) -> dict:
    return {"prompt": f"Is {number} even?", "chosen": ["Yes.", "No."][number % 2], "rejected": "Bread."} | changes


def preferences(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Of texts, for a model without a chat template."""
    folder.mkdir()
    (folder / CONFIG).write_text(PREFERENCES)
    write_model(folder / "base", tokenizer or byte_level(eos="<eos>"))
    for name, rows in (("train", range(8)), ("test", range(20, 26))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair(number)) + "\n" for number in rows))


def chat(folder: Path) -> None:
    """For a model with a chat template, which refuses a system's message."""
    preferences(folder, family("gemma"))
