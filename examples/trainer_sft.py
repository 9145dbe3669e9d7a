"""Fine-tuning of a few percent of the weights in transformers' Trainer, alone or under torchrun on several devices.

    python examples/trainer_sft.py MODEL texts.jsonl OUT

texts.jsonl: rows {text}. The weights are chosen by chance, which needs no gradients; `Selection.load` takes those that
a run located, `Selection.from_scores` any others.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from allo_fast import Selection, SparseAdamW, SparsePolicy
from allo_fast.model.weights import fingerprint, named_weights

parser = argparse.ArgumentParser()
for name in ("model", "texts", "out"):
    parser.add_argument(name)
parser.add_argument("--ratio", type=float, default=0.05)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--max-length", type=int, default=512)
parser.add_argument("--batch-size", type=int, default=8)
given = parser.parse_args()

model, tokenizer = AutoModelForCausalLM.from_pretrained(given.model), AutoTokenizer.from_pretrained(given.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
arguments = TrainingArguments(
    given.out,
    per_device_train_batch_size=given.batch_size,
    num_train_epochs=1,
    save_strategy="no",
    logging_steps=1,
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
)
model.to(arguments.device)  # before the policy is made
draw = torch.Generator().manual_seed(0)
scores = {name: torch.rand(weight.shape, generator=draw) for name, weight in named_weights(model).items()}
policy = SparsePolicy(model, Selection.from_scores(scores, given.ratio, base=fingerprint(model)))


def tokenized(row: dict) -> dict:
    return tokenizer(row["text"], truncation=True, max_length=given.max_length)


rows = load_dataset("json", data_files=given.texts, split="train")
trainer = Trainer(
    model,
    arguments,
    train_dataset=rows.map(tokenized, remove_columns=rows.column_names),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    optimizers=(SparseAdamW(policy, lr=given.learning_rate), None),
)
trainer.train()
policy.save_delta(Path(given.out, "delta.safetensors"))
print(f"{policy.changed():,} of {policy.parameters:,} weights changed")
