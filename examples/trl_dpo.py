"""DPO on a few percent of the weights in TRL's DPOTrainer, whose reference is the policy's own base: no second model.

    for stage in sample pairs locate; do allo-fast $stage my.yaml; done  # `allo-fast init` writes my.yaml
    # in the run's model.dtype, which the first command says: --dtype float32 or bfloat16
    python examples/trl_dpo.py MODEL runs/my/05-locate/seed-0/learn.safetensors pairs.jsonl OUT

pairs.jsonl: rows {prompt, chosen, rejected}, as TRL reads them. OUT/model is a normal folder; OUT/delta.safetensors, a
few percent of its size, is for `allo_fast.load_delta` and `allo-fast merge`.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from allo_fast import Selection, SparseAdamW, SparsePolicy

parser = argparse.ArgumentParser()
for name in ("model", "selection", "pairs", "out"):
    parser.add_argument(name)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--dtype", default="bfloat16", help="that the selection was located in")
parser.add_argument("--batch-size", type=int, default=8)
given = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).to(device)
policy = SparsePolicy(model, Selection.load(given.selection))
arguments = DPOConfig(
    given.out,
    per_device_train_batch_size=given.batch_size,
    precompute_ref_log_probs=True,
    save_strategy="no",
    logging_steps=1,
    report_to=[],
    use_cpu=device == "cpu",
)
with policy.reference():  # inside, the model is the base: its log-probabilities are computed here, once
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=given.pairs, split="train"),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        optimizers=(SparseAdamW(policy, lr=given.learning_rate), None),
    )
trainer.train()
trainer.save_model(str(Path(given.out, "model")))
policy.save_delta(Path(given.out, "delta.safetensors"))
print(f"{policy.changed():,} of {policy.parameters:,} weights changed")
