"""transformers.Trainer around a small SparsePolicy, in one process (test_trainer.py) or on a rank (test_ranks.py)."""

import gc
import os
from pathlib import Path

import torch
from conftest import random_selection, tiny_llama
from torch import Tensor
from torch import distributed as dist
from transformers import Trainer, TrainingArguments

from allo_fast import SparseAdamW, SparsePolicy

LR = 1e-2


def rows(count: int = 24) -> list[dict]:
    """Of one length, with unlike numbers of labels."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 61, (count, 9), generator=draw).tolist()
    return [{"input_ids": row, "labels": [-100] * (place % 5) + row[place % 5 :]} for place, row in enumerate(tokens)]


def make_trainer(model, optimizer, folder: Path, **changes) -> Trainer:
    """Four steps of whatever trains, clipped in each; without checkpoints unless `changes` say so."""
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.1,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(folder, **settings | changes)
    data = rows()
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:6], optimizers=(optimizer, None))


def sparse_trainer(
    folder: Path, dtype: torch.dtype = torch.float32, rounding_seed: int | None = None, **changes
) -> tuple[Trainer, SparsePolicy]:
    model = tiny_llama().to(dtype)
    policy = SparsePolicy(model, random_selection(model), rounding_seed=rounding_seed)
    return make_trainer(model, SparseAdamW(policy, lr=LR), folder, **changes), policy


def vector(policy: SparsePolicy) -> Tensor:
    """A copy of all values [K]."""
    return torch.cat([value.detach() for value in policy.values.values()])


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def train(folder: Path) -> None:
    """Trains, and again from the checkpoint after two steps, then recomputing activations; each rank leaves a file."""
    _train(folder)
    gc.collect()  # a reducer that is the last to hold the group would wait for a thread that waits for the interpreter
    dist.destroy_process_group()


def _train(folder: Path) -> None:
    changes = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer, policy = sparse_trainer(folder / "out", **changes)
    trainer.train()
    again, resumed = sparse_trainer(folder / "out", gradient_checkpointing=True, **changes)
    again.train(resume_from_checkpoint=str(folder / "out/checkpoint-2"))
    found = {"values": vector(policy), "resumed": vector(resumed), "norms": logged(trainer, "grad_norm")}
    torch.save(found, folder / f"rank-{os.environ['RANK']}.pt")
