"""DeepSpeed ZeRO on this machine's ranks: model states per rank and bytes per step, dense DPO beside selected weights.

Every row is measured: live tensors when gradients are there, and what the step hands to collectives. Beside it stands
what `allo-fast plan` says. Each world is one launch of torchrun; nothing stays gathered, as in a model of billions.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allo_fast import ranks
from allo_fast.config import LearnConfig, ModelConfig
from allo_fast.durable import versions
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Preference
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.weights import fingerprint, named_weights
from allo_fast.plan import costs
from allo_fast.plan.shapes import Shape, shape_of
from allo_fast.training.engine import Trainer
from allo_fast.training.sharded import ShardedPolicy
from allo_fast.training.zero import Zero
from allo_kernels import memory
from benchmarks.inputs import few_pairs

MODEL = LlamaConfig(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4)
LARGE = {f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")}


@dataclass(frozen=True)
class Row:
    world: int
    stage: int
    placement: str
    state_bytes: int  # rank 0's live tensors after backward or before the update, whichever are more
    planned_state_bytes: int
    traffic_bytes: int  # per step and rank
    planned_traffic_bytes: int
    parameters: int


def run(worlds: tuple[int, ...], dtype: str, ratio: float, out: Path | None) -> list[Row]:
    """Prints a table; writes JSON with versions when `out` is given."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            found = Path(folder) / f"{world}.json"
            arguments = ["-m", "benchmarks.zero", str(found), dtype, str(ratio)]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
            done = subprocess.run([*launcher, *arguments], stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            rows += [Row(**row) for row in json.loads(found.read_text())]
    print(table(rows))
    if out:
        held = {"ratio": ratio, "dtype": dtype, "versions": versions(), "date": time.strftime("%Y-%m-%d")}
        out.write_text(json.dumps({**held, "rows": [*map(asdict, rows)]}, indent=1))
    return rows


def table(rows: list[Row]) -> str:
    """state bytes are per weight of the model; the ratios are to dense DPO in the same world and stage."""
    head = f"{'world':>5} {'stage':>5} {'placement':<10}{'state bytes/weight':>20}{'plan':>8}{'ratio':>8}"
    lines = [head + f"{'traffic/step, kB':>19}{'plan':>10}{'ratio':>8}"]
    dense = {(row.world, row.stage): row for row in rows if row.placement == "dense"}
    for row in rows:
        rival = dense[row.world, row.stage]
        cells = [row.state_bytes / row.parameters, row.planned_state_bytes / row.parameters]
        share = row.traffic_bytes / rival.traffic_bytes if rival.traffic_bytes else 0
        lines.append(
            f"{row.world:>5} {row.stage:>5} {row.placement:<10}{cells[0]:>20.3f}{cells[1]:>8.3f}"
            f"{row.state_bytes / rival.state_bytes:>8.3f}{row.traffic_bytes / 1e3:>19.1f}"
            f"{row.planned_traffic_bytes / 1e3:>10.1f}{share:>8.4f}"
        )
    return "\n".join(lines)


def measure(zero: Zero, ratio: float | None, shape: Shape, dtype: str, model: LlamaForCausalLM, folder: Path) -> Row:
    """Of one process in a group; as many weights stay gathered as in a model of billions: none. ratio None: dense."""
    zero, world = replace(zero, options={**zero.options, **(LARGE if zero.sharded else {})}), ranks.world_size()
    train = LearnConfig(
        learning_rate=1e-5,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_train_epochs=2,
        ratio=ratio or 1.0,
    )
    config = ModelConfig(dtype=dtype, gradient_checkpointing=model.training)
    before = memory.live_bytes() - sum(weight.nbytes for weight in model.parameters())
    trainer = Trainer(
        _policy(model, ratio, zero), few_pairs(model.config.vocab_size), Preference(0.1, 0.5), train, folder, zero=zero
    )
    running, found = trainer.run(), []
    next(running)  # it has no learning rate
    trainer.backend.optimizer.register_step_pre_hook(lambda *_: found.append(_settled_bytes()))
    trainer.backend.backward = _watched(trainer.backend.backward, found)
    metrics = list(running)
    kept = sum(values.nbytes for values, _ in trainer.examples.reference._parts)
    trainer.backend.close()
    planned = costs.states(shape, dtype, ratio, zero, world, 4 // world)
    return Row(
        world=world,
        stage=zero.stage,
        placement="dense" if ratio is None else "sharded" if zero.sharded else "resident",
        state_bytes=max(found) - before - kept,
        planned_state_bytes=sum(planned.values()),
        traffic_bytes=int(metrics[-1].metrics["traffic_bytes"]),
        planned_traffic_bytes=sum(costs.traffic(shape, config, 4, ratio, zero, world).values()),
        parameters=shape.parameters,
    )


def _watched(backward: Callable, found: list[int]) -> Callable:
    """Looks when gradients are there, as the optimizer's own hook does when DeepSpeed has divided them."""

    def watched(loss: torch.Tensor, last: bool) -> None:
        backward(loss, last)
        found.append(_settled_bytes())

    return watched


def _settled_bytes() -> int:
    """Once gloo's threads have let go of what they sent."""
    time.sleep(0.2)
    return memory.live_bytes()


def _policy(model: LlamaForCausalLM, ratio: float | None, zero: Zero) -> DensePolicy | SparsePolicy:
    if ratio is None:
        return DensePolicy(model.float())
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(weight.shape, generator=draw) for name, weight in named_weights(model).items()}
    selection = Selection.from_scores(scores, ratio, base=fingerprint(model))
    return (ShardedPolicy if zero.sharded else SparsePolicy)(model, selection)


def main(out: str, dtype: str, ratio: str) -> None:
    ranks.start(600)
    rows, shape = [], shape_of(MODEL, dtype)
    for stage in range(4):
        for share in (None, float(ratio)):
            torch.manual_seed(0)
            model = LlamaForCausalLM(MODEL).to(getattr(torch, dtype)).eval()
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(Zero(stage), share, shape, dtype, model, Path(folder)))
            del model
    if ranks.is_main():
        Path(out).write_text(json.dumps([asdict(row) for row in rows]))
    ranks.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
