"""Our Trainer, as one process (or rank) of `python -m benchmarks step`.

`sparse` trains single weights, `sparse-rows` whole rows, `sparse-2-ranks` divides the micro-batches between two
processes, `dense` trains all weights in float32. `-checkpointed` recomputes activations; `-768` has micro-batches of
at most 768 tokens, by `max_tokens_per_batch`, where the others have TRL's pairs. The loss is DPO's on all tokens,
which is TRL's; weights are selected by chance, which takes as long as any selection.
"""

import logging
import tempfile
from collections import deque
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers

from allo_fast import ranks
from allo_fast.config import ModelConfig, TrainConfig
from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Preference
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.rows import row_lengths
from allo_fast.method.selection import Selection
from allo_fast.model.loading import load_model
from allo_fast.model.weights import fingerprint, named_weights
from allo_fast.training.engine import Trainer
from allo_fast.training.zero import Zero
from allo_kernels import memory
from benchmarks import step_profile
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

Policy = DensePolicy | SparsePolicy
BUDGET = 768  # tokens


def measure(job: Job) -> Outcome | None:
    import_bytes = resident_bytes()
    if ranks.launched_world_size() > 1:
        ranks.start(600)
    with tempfile.TemporaryDirectory() as own_folder:
        folder = Path(ranks.gather(own_folder)[0])
        trainer = make_trainer(make_policy(job), job, job.rows("check"), folder / "check", CHECK_STEPS)
        steps = list(trainer.run())
        check_falls(losses := [step.loss for step in steps])
        state_bytes = memory.live_bytes()
        trainer.backend.close()
        del trainer
        rows = job.rows("pairs")
        if torch.cuda.is_available():  # whose kernels are compiled for what an epoch has
            deque(make_trainer(make_policy(job), job, rows, folder / "warm-up").run(), maxlen=0)
        policy = make_policy(job)
        trainer, counted = make_trainer(policy, job, rows, folder / "epoch"), Positions([policy.model])
        if len(trainer.examples) < len(rows):
            raise RuntimeError(f"{len(rows) - len(trainer.examples)} of {len(rows)} pairs are longer than the budget")
        (clock := Clock()).start(policy.model.device)
        with step_profile.shares() if job.profile else nullcontext():
            deque(trainer.run(), maxlen=0)
        everyone = ranks.gather((clock.read(), counted.training, counted.reference))
        trainer.backend.close()
        if job.profile:  # slower, and of a policy that was trained already
            trainer = make_trainer(policy, job, rows, folder / "traced")
            with step_profile.trace(Path(job.profile)):
                deque(trainer.run(), maxlen=0)
    outcome = Outcome(
        pairs=len(rows),
        seconds=max(times["seconds"] for times, *_ in everyone),
        cpu_seconds=sum(times["cpu_seconds"] for times, *_ in everyone),
        peak_bytes=max(times["peak_bytes"] for times, *_ in everyone),
        import_bytes=import_bytes,
        state_bytes=state_bytes,
        parameters=policy.parameters,
        trained=policy.selected if isinstance(policy, SparsePolicy) else policy.parameters,
        positions=sum(training for _, training, _ in everyone),
        reference_positions=sum(reference for *_, reference in everyone),
        losses=losses,
        logps=[steps[0].metrics["logps/chosen"], steps[0].metrics["logps/rejected"]],
        versions=installed(),
    )
    return outcome if ranks.is_main() else None


def make_trainer(policy: Policy, job: Job, rows: list[dict], folder: Path, steps: int | None = None) -> Trainer:
    """steps: that many, each of all rows, at a large learning rate; None: one epoch."""
    world = ranks.world_size()
    micro_pairs, step_pairs = (len(rows), len(rows)) if steps else (job.micro_pairs, job.step_pairs)
    settings = {
        "learning_rate": RATES["dense" if job.contender == "dense" else "some"] if steps else 1e-6,
        "lr_scheduler_type": "constant" if steps else "linear",
        "warmup_steps": 0,
        "num_train_epochs": steps or 1,
        "per_device_train_batch_size": max(1, micro_pairs // world),
        "gradient_accumulation_steps": step_pairs // max(1, micro_pairs // world),
        "save_steps": 10**9,
        **({"max_tokens_per_batch": BUDGET} if f"-{BUDGET}" in job.contender else {}),
        **({} if steps else job.settings),
    }
    zero = Zero(0) if world > 1 else None
    return Trainer(policy, corpus_of_pairs(rows), Preference(0.1), TrainConfig(**settings), folder, zero=zero)


def make_policy(job: Job) -> Policy:
    config = ModelConfig(dtype=job.dtype, gradient_checkpointing=job.contender.endswith("-checkpointed"))
    model = load_model(job.model, config)
    if job.contender == "dense":  # as the warm-up trains: float32 weights, matrix products in the base's dtype
        return DensePolicy(model.float(), None if job.dtype == "float32" else getattr(torch, job.dtype))
    draw, weights = torch.Generator(model.device).manual_seed(0), named_weights(model)
    scores = {name: torch.rand(weight.shape, generator=draw, device=model.device) for name, weight in weights.items()}
    lengths = row_lengths(model) if job.contender == "sparse-rows" else None
    return SparsePolicy(model, Selection.from_scores(scores, job.ratio, base=fingerprint(model), rows=lengths))


if __name__ == "__main__":
    logging.getLogger("allo_fast").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    main(measure)
    ranks.stop()
