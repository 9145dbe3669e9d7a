"""TRL's DPOTrainer, dense and with PEFT's adapters, as one process of `python -m benchmarks step`.

It runs in the environment that `make rivals` makes. What a user of TRL gets: its own model loading, reference, head
(the logits in chunks, the default of 1.16), AdamW and logging; but token ids come as they are, where TRL would tokenize
texts, so that all train on the same ones. On a CPU that head computes every position, on a GPU those of responses.
bfloat16 is TRL's default, `bf16=True`: float32 weights, products by autocast; bfloat16-model has bfloat16 weights.
Checkpointing of activations, also a default of TRL, is on only where the contender says so.
"""

import logging
import tempfile
from collections.abc import Callable
from functools import partial

import peft
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from allo_kernels import memory
from benchmarks.step_measure import (
    CHECK_STEPS,
    RATES,
    Job,
    Outcome,
    Positions,
    check_falls,
    clocked,
    installed,
    main,
    resident_bytes,
)

LINEAR = "all-linear"  # PEFT's word for every linear layer but the head


class Trainer(DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *_) -> Dataset:
        return dataset  # it has token ids


class LiveBytes(TrainerCallback):
    """Of all tensors once weights were updated, while their gradients are there."""

    def __init__(self):
        self.last = 0

    def on_optimizer_step(self, *_, **__):
        self.last = memory.live_bytes()


def lora(model: nn.Module, trained: int, targets: str | None) -> peft.PeftConfig:
    return peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")


def shira(model: nn.Module, trained: int) -> peft.PeftConfig:
    """`trained` weights, as nearly as r (in + out) in each layer allows."""
    sides = sum(sum(layer.weight.shape) for layer in linear_layers(model))
    return peft.ShiraConfig(r=max(1, round(trained / sides)), target_modules=LINEAR, task_type="CAUSAL_LM")


def supertuning(model: nn.Module, trained: int) -> peft.PeftConfig:
    weights = sum(layer.weight.numel() for layer in linear_layers(model))
    return peft.SupertuningConfig(sparsity=1 - trained / weights, target_modules=LINEAR, task_type="CAUSAL_LM")


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


ADAPTERS: dict[str, Callable[[nn.Module, int], peft.PeftConfig]] = {
    "trl-lora": partial(lora, targets=None),  # PEFT's default: of a Llama the queries and values
    "trl-lora-all": partial(lora, targets=LINEAR),
    "peft-shira": shira,
    "peft-supertuning": supertuning,
}


def measure(job: Job) -> Outcome:
    import_bytes = resident_bytes()
    live = LiveBytes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(job, folder, job.rows("check"), CHECK_STEPS, [live])
        trainer.train()
        history = [row for row in trainer.state.log_history if "loss" in row]
        check_falls(losses := [row["loss"] for row in history])
        del trainer
        trainer = _trainer(job, folder, rows := job.rows("pairs"), None, [])
        positions = Positions(model for model in (trainer.model, trainer.ref_model) if model)
        times = clocked(trainer.train, trainer.accelerator.device)
        parameters = list(trainer.model.parameters())
        return Outcome(
            pairs=len(rows),
            **times,
            import_bytes=import_bytes,
            state_bytes=live.last,
            parameters=sum(weight.numel() for weight in parameters),
            trained=sum(weight.numel() for weight in parameters if weight.requires_grad),
            positions=positions.training,
            reference_positions=positions.reference,
            losses=losses,
            logps=[history[0]["logps/chosen"], history[0]["logps/rejected"]],
            versions=installed(),
        )


def _trainer(job: Job, folder: str, rows: list[dict], steps: int | None, callbacks: list[TrainerCallback]) -> Trainer:
    """steps: that many of all rows at a large learning rate, each logged; None: one epoch."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    weights = "bfloat16" if job.dtype == "bfloat16-model" else "float32"
    schedule = {"num_train_epochs": 1, "per_device_train_batch_size": job.micro_pairs}
    schedule |= {"gradient_accumulation_steps": job.step_pairs // job.micro_pairs}
    if steps:
        rate = RATES["some" if job.contender in ADAPTERS else "dense"]
        schedule = {"max_steps": steps, "per_device_train_batch_size": len(rows), "logging_steps": 1}
        schedule |= {"learning_rate": rate, "lr_scheduler_type": "constant", "warmup_steps": 0}
    settings = DPOConfig(
        folder,
        bf16=job.dtype == "bfloat16",
        gradient_checkpointing=job.contender == "trl-checkpointed",
        model_init_kwargs={"dtype": weights},
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **schedule,
    )
    dataset = Dataset.from_list([{name: row[name] for name in row if name != "id"} for row in rows])
    return Trainer(
        job.model,
        args=settings,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=_adapter(job),
    )


def _adapter(job: Job) -> peft.PeftConfig | None:
    """What SparsePolicy trains of the model is how many weights a sparse adapter trains, too."""
    if job.contender not in ADAPTERS:
        return None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(job.model))
    return ADAPTERS[job.contender](model, int(job.ratio * sum(weight.numel() for weight in model.parameters())))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    main(measure)
