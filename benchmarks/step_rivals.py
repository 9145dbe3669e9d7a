"""TRL's DPOTrainer, dense and with PEFT's adapters, as one process of `python -m benchmarks step`.

It runs in the environment that `make rivals` makes. What a user of TRL gets: its own model loading, reference, head
(the logits in chunks, the default of 1.16), AdamW and logging; but token ids come as they are, where TRL would tokenize
texts, so that all train on the same ones. On a CPU that head computes every position, on a GPU those of responses.
bfloat16 is TRL's default, `bf16=True`: float32 weights, products by autocast; bfloat16-model has bfloat16 weights.
Checkpointing of activations, also a default of TRL, is on only where the contender says so.
"""

import logging
import tempfile

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from allo_kernels import memory
from benchmarks.step_measure import (
    CHECK_STEPS,
    RATES,
    Clock,
    Job,
    Outcome,
    Positions,
    check_falls,
    installed,
    main,
    resident_bytes,
)

DENSE = ("trl", "trl-checkpointed")
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


class Started(TrainerCallback):
    """Starts a clock when the trainer begins its first step."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_begin(self, arguments, *_, **__):
        self.clock.start(arguments.device)


def adapter(name: str, model: nn.Module, trained: int):
    """PEFT's configuration; of a sparse adapter with `trained` weights, as nearly as it has such a number."""
    import peft

    head = model.get_output_embeddings()
    shapes = [layer.weight.shape for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    if name == "peft-shira":  # r (in + out) weights of each layer
        rank = max(1, round(trained / sum(sum(shape) for shape in shapes)))
        return peft.ShiraConfig(r=rank, target_modules=LINEAR, task_type="CAUSAL_LM")
    if name == "peft-supertuning":
        sparsity = 1 - trained / sum(shape.numel() for shape in shapes)
        return peft.SupertuningConfig(sparsity=sparsity, target_modules=LINEAR, task_type="CAUSAL_LM")
    targets = LINEAR if name == "trl-lora-all" else None  # PEFT's default: of a Llama the queries and values
    return peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")


def measure(job: Job) -> Outcome:
    import_bytes = resident_bytes()
    live = LiveBytes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(job, folder, job.rows("check"), CHECK_STEPS, [live])
        trainer.train()
        history = [row for row in trainer.state.log_history if "loss" in row]
        check_falls(losses := [row["loss"] for row in history])
        del trainer
        if torch.cuda.is_available():  # as ours
            _trainer(job, folder, job.rows("pairs"), None, []).train()
        clock = Clock()
        trainer = _trainer(job, folder, rows := job.rows("pairs"), None, [Started(clock)])
        positions = Positions(model for model in (trainer.model, trainer.ref_model) if model)
        trainer.train()
        times = clock.read()
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
        rate = RATES["dense" if job.contender in DENSE else "some"]
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


def _adapter(job: Job):
    """None where all weights train; as many train in a sparse adapter as a SparsePolicy has selected."""
    if job.contender in DENSE:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))
    return adapter(job.contender, model, int(job.ratio * sum(weight.numel() for weight in model.parameters())))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    main(measure)
