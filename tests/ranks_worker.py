"""What the ranks of a test do: CASE FOLDER [ARGUMENT ...]; assertions fail it. Without arguments, serves such cases.

What one process does without DeepSpeed is computed first, before the processes meet.
"""

import json
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DYNAMIC, TINY, pair_corpus, random_selection, tiny_llama
from deepspeed.module_inject import auto_ep_layer  # noqa: F401  (what DeepSpeed imports with its first engine)
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401  (that, too)
from rank_server import serve
from safetensors.torch import save_file
from sweeps import make_sweep, same, scores_of
from sweeps import settings as sweep_settings
from test_rewards import run as run_rewards
from test_rewards import unit_in, write_earlier_stages
from trainer_worker import train as in_transformers  # noqa: F401  (a case)
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from allo_fast import commands, ranks
from allo_fast.__main__ import main
from allo_fast.config import Config, ModelConfig, TrainConfig, UserError
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.batch import Layout, collate
from allo_fast.locating.sweep import Sweep
from allo_fast.method.delta import Delta
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Preference
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.scores import Random
from allo_fast.method.selection import Selection
from allo_fast.model.loading import load_model
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.saving import save_model
from allo_fast.model.weights import divide, fingerprint, named_weights, whole_weights
from allo_fast.model.weights import same_bits as same_bits_of
from allo_fast.plan.locating import locate_phase
from allo_fast.plan.phase import DEVICES, Job
from allo_fast.plan.rows import unknown_rows
from allo_fast.plan.shapes import shape_of
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, evaluate, models
from allo_fast.training.backend_deepspeed import differentiable, frozen_engine
from allo_fast.training.engine import Trainer, TrainingError
from allo_fast.training.examples import Examples
from allo_fast.training.guard import CHANGE, Guard
from allo_fast.training.held_out import HeldOut
from allo_fast.training.reference import Opened, reference_logps
from allo_fast.training.sharded import ShardedPolicy
from allo_fast.training.watching import Watches
from allo_fast.training.zero import _OPTIONS, Zero
from allo_kernels import memory

# Nothing stays gathered, as in a model of billions: every weight is gathered and released around its use.
LARGE = {f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")}
# Wide enough for what is counted for each weight to outweigh the rest.
WIDE = TINY | {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, "head_dim": 32}
# Sizes that 4 ranks do not divide, and biases.
ODD = {"hidden_size": 34, "num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True}
SETTINGS = {"learning_rate": 1e-2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
SETTINGS |= {"warmup_steps": 1, "max_grad_norm": 0.5, "num_train_epochs": 2}
UNEVEN = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}

OPEN = ExitStack()  # closes what `build` made


def build(kind: str, folder: Path, zero: Zero | None, model=None, autocast=None, **changes) -> Trainer:
    model = model or tiny_llama(**ODD, tie_word_embeddings=changes.pop("tied", False))
    selection = random_selection(model) if kind == "sparse" else None
    if changes.pop("shards", False):
        divide(*model.parameters())
    if kind == "dense":
        policy = DensePolicy(model, autocast)
    else:
        policy = (ShardedPolicy if zero and zero.sharded else SparsePolicy)(model, selection)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(policy, pair_corpus(), Preference(0.5, 0.5), TrainConfig(**SETTINGS | changes), folder, zero=zero)
    OPEN.callback(trainer.backend.close)
    return trainer


def outcome(trainer: Trainer) -> dict:
    metrics = list(trainer.run())
    return {
        "losses": torch.tensor([m.loss for m in metrics]),
        "norms": torch.tensor([m.grad_norm for m in metrics]),
        "kl": torch.tensor([m.metrics.get("eval_kl", 0.0) for m in metrics]),
        "weights": {name: weight.detach().clone() for name, weight in trainer.backend.full_weights()},
        "reference": dict(enumerate(map(torch.tensor, trainer.examples.reference))),
    }


def assert_alike(ours: dict, wanted: dict, label: str) -> None:
    """To rounding: ranks add gradients up in another order, and Adam turns the last bit into a part of lr."""
    torch.testing.assert_close(ours["losses"], wanted["losses"], rtol=1e-4, atol=1e-5, msg=lambda m: f"{label}: {m}")
    torch.testing.assert_close(ours["norms"], wanted["norms"], rtol=1e-3, atol=1e-5, msg=lambda m: f"{label}: {m}")
    assert ours["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        assert (ours["weights"][name] - weight).abs().mean() < 1e-6, f"{label}: {name}"
    for number, logps in wanted["reference"].items():
        torch.testing.assert_close(ours["reference"][number], logps, rtol=0, atol=1e-5)


def agree(folder: Path, *names: str) -> None:
    """names: what trains, and whether the head is the embedding, as in "sparse tied"."""
    cases = [(kind, head == "tied") for kind, head in map(str.split, names)]
    epoch = {"num_train_epochs": 1}  # of three steps: without a learning rate, and two with one
    locals_ = {case: build(case[0], folder / f"local-{case}-{rank()}", None, tied=case[1], **epoch) for case in cases}
    wanted = {case: outcome(trainer) for case, trainer in locals_.items()}
    ranks.start(120)
    for kind, tied in cases:
        for stage in range(4):
            label = f"{kind} tied={tied} stage {stage}"
            zero = Zero(stage, options=LARGE if stage == 3 else {})
            trainer = build(kind, folder / label, zero, tied=tied, **epoch)
            assert_alike(outcome(trainer), wanted[kind, tied], label)
            if kind == "sparse":
                reference_is_the_base(trainer, tied, locals_[kind, tied].policy.response_logps)


def reference_is_the_base(trainer: Trainer, tied: bool, wanted) -> None:
    """After training, bit for bit; the policy, with gradients or without, is `wanted` before and afterwards."""
    corpus, policy = trainer.corpus, trainer.policy
    batch = collate(corpus, corpus.examples[:2], policy.logps.layout)
    torch.testing.assert_close(before := policy.response_logps(batch).detach(), wanted(batch), rtol=0, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(before, policy.response_logps(batch))
        with policy.reference():
            reference = policy.response_logps(batch)
        after = policy.response_logps(batch)
        base = SparsePolicy(model := tiny_llama(**ODD, tie_word_embeddings=tied), random_selection(model))
        assert torch.equal(reference, base.response_logps(batch))
    assert torch.equal(before, after) and not torch.equal(before, reference)


def bfloat16(folder: Path) -> None:
    """A run on ranks is nearer to one process's than two dense runs of one process are, cut differently, to another."""

    def trained(kind: str, name: str, zero: Zero | None = None, **cut) -> dict:
        model = tiny_llama(**ODD)
        if kind == "sparse":
            model.bfloat16()
        place = f"{name}-{rank()}" if zero is None else name
        return outcome(build(kind, folder / place, zero, model, torch.bfloat16, **cut))

    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    wanted = {kind: trained(kind, f"local-{kind}", **cut) for kind in ("dense", "sparse")}
    spread = distances(wanted["dense"], trained("dense", "cut"))
    ranks.start(120)
    for kind in wanted:
        for stage in range(4):
            zero = Zero(stage, options=LARGE if stage == 3 else {})
            found = distances(trained(kind, f"{kind}-{stage}", zero, **cut), wanted[kind])
            assert all(found[key] <= spread[key] for key in spread), f"{kind} stage {stage}: {found}, dense: {spread}"


def distances(ours: dict, wanted: dict) -> dict[str, float]:
    """The largest difference of losses, and the mean one of weights."""
    apart = [(ours["weights"][name].float() - weight.float()).flatten() for name, weight in wanted["weights"].items()]
    losses = (ours["losses"] - wanted["losses"]).abs().max()
    return {"losses": float(losses), "weights": float(torch.cat(apart).abs().mean())}


def same_bits(folder: Path) -> None:
    """Two micro-batches a step on one or two ranks: a sum of two does not depend on who adds."""
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    wanted = outcome(build("dense", folder / f"local-{rank()}", None, model=tiny_llama(), **cut))
    ranks.start(120)
    for stage in range(4):
        ours = outcome(build("dense", folder / f"stage-{stage}", Zero(stage), model=tiny_llama(), **cut))
        for name, weight in wanted["weights"].items():
            assert torch.equal(ours["weights"][name], weight), f"stage {stage}: {name}"


def cuts(folder: Path) -> None:
    """The update does not depend on accumulation, nor, sharded, on activation checkpointing."""
    ranks.start(120)
    for stage in (1, 2, 3):
        zero = Zero(stage, options=LARGE if stage == 3 else {})
        one = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
        four = {**one, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        whole = outcome(build("sparse", folder / f"{stage}-one", zero, **one))
        split = outcome(build("sparse", folder / f"{stage}-four", zero, **four))
        whole["reference"] = split["reference"] = {}
        assert_alike(split, whole, f"stage {stage}")
    trainer = build("sparse", folder / "recomputed", Zero(3, options=LARGE), model=recomputing_llama(), **one)
    recomputed = outcome(trainer)
    recomputed["reference"] = {}
    assert_alike(recomputed, whole, "recomputed")


def recomputing_llama() -> LlamaForCausalLM:
    model = tiny_llama(**ODD).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


# Weights read outside their module, an error while it is tried, as many passes as rows, experts; all in shares.
ARCHITECTURES = {
    "mamba": MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2),
    "alibi": FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    "dynamic": LlamaConfig(**TINY | {"max_position_embeddings": 12}, rope_parameters=DYNAMIC),
    "experts": MixtralConfig(**TINY, num_local_experts=4),
}


def architectures(folder: Path, *names: str) -> None:
    cases = [(name, kind) for name in names or ARCHITECTURES for kind in ("sparse", "dense")]
    wanted = {}
    for name, kind in cases:
        trainer = build(kind, folder / f"local-{name}-{kind}-{rank()}", None, random_model(name), **UNEVEN)
        wanted[name, kind] = trainer.policy.logps.findings, outcome(trainer)
    ranks.start(120)
    for name, kind in cases:
        zero = Zero(3, options=LARGE)
        trainer = build(kind, folder / f"{name}-{kind}", zero, random_model(name), shards=True, **UNEVEN)
        findings, alone = wanted[name, kind]
        assert trainer.policy.logps.findings == findings
        assert_alike(outcome(trainer), alone, f"{name} {kind}")


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()


def offload(folder: Path) -> None:
    wanted = {kind: outcome(build(kind, folder / f"local-{kind}-{rank()}", None)) for kind in ("dense", "sparse")}
    ranks.start(120)
    for kind in wanted:
        for stage in (1, 2, 3):
            trainer = build(kind, folder / f"{kind}-{stage}", Zero(stage, offload=True))
            assert_alike(outcome(trainer), wanted[kind], f"{kind} stage {stage}")


def steps(folder: Path, kind: str, stage: str, until: str) -> None:
    """Continues the run in `folder` on this many ranks; stage: of ZeRO, or local. At the end writes the outcome."""
    if stage != "local":
        ranks.start(120)
    zero = None if stage == "local" else Zero(int(stage))
    trainer = build(kind, folder, zero, save_steps=1)
    for metrics in trainer.run():
        if metrics.step == int(until):
            break
    weights = dict(trainer.backend.full_weights())
    if ranks.is_main():
        torch.save({name: weight.clone() for name, weight in weights.items()}, folder / "weights.pt")
        print(json.dumps({"step": metrics.step, "bytes": next(folder.glob("checkpoint-*")).stat().st_size}))


def killed(folder: Path) -> None:
    ranks.start(120)
    for metrics in build("sparse", folder, Zero(2), save_steps=1).run():
        if metrics.step == 2 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def located(folder: Path) -> None:
    """The same selection from whole models and from shards, ties and skipped weights included."""
    before, after = tiny_llama(**ODD), tiny_llama(**ODD)
    draw = torch.Generator().manual_seed(0)
    for weight in after.parameters():  # few different changes: most are tied
        weight.data += torch.randint(-3, 4, weight.shape, generator=draw) / 64
        weight.data.copy_((weight.data * 64).round() / 64)
    for weight in before.parameters():
        weight.data.copy_((weight.data * 64).round() / 64)
    settings = [{"ratio": 0.05}, {"ratio": 0.3, "skip": 0.2}, {"ratio": 0.1, "exclude": ("*norm*",)}]
    settings += [{"ratio": 0.1, "scope": "per_tensor"}, {"ratio": 0.1, "skip": 0.01, "last": True}]
    wanted = [Selection.from_delta(before, after, **setting).sha256() for setting in settings]
    drawn = {name: Random(name, weight.numel(), seed=1) for name, weight in before.named_parameters()}
    at_random = Selection.from_scores(drawn, 0.1, base="").sha256()
    ranks.start(120)
    assert Selection.from_scores(drawn, 0.1, base="").sha256() == at_random
    assert [Selection.from_delta(before, after, **setting).sha256() for setting in settings] == wanted
    import deepspeed

    for model in (before, after):
        deepspeed.zero.Init(module=model, config_dict_or_path={"train_micro_batch_size_per_gpu": 1})
    sharded = [Selection.from_delta(before, after, **setting) for setting in settings]
    assert [selection.sha256() for selection in sharded] == wanted
    assert len({selection.base for selection in sharded}) == 1


def sweep_of(kind: str, folder: Path, score: str = "linear") -> Sweep:
    """kind: whole, or in shares of all ranks."""
    model = tiny_llama(**ODD, tie_word_embeddings=True)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_train_epochs": 1}
    given = {"windows": 3, "config": sweep_settings(**cut), "corpus": pair_corpus(3)}
    if kind == "whole":
        return make_sweep(model, folder, score, **given)
    divide(*model.parameters())
    engine = OPEN.enter_context(frozen_engine(logps := ResponseLogps(model.requires_grad_(False))))
    return make_sweep(logps, folder, score, compute=differentiable(engine), **given)


def swept(folder: Path, *names: str) -> None:
    """Ranks with the whole base divide the passes and give the bits of one process; in shares the same to rounding."""
    alone = {name: scores_of(sweep_of("whole", folder / f"{name} {rank()}", name)) for name in names}
    ranks.start(120)
    for name in names:
        for kind in ("whole", "shares"):
            sweep = sweep_of(kind, folder / f"{name} {kind}", name)
            ours = scores_of(sweep)
            assert kind == "shares" or same(ours, alone[name]), name
            for weight, score in alone[name].items():
                assert (ours[weight] - score).abs().mean() < 1e-6 * score.max(), f"{name} {kind} {weight}"
            files = Counter(path.name.partition(".")[0] for path in sweep.folder.glob("score-*.safetensors"))
            assert files == {f"score-00{n}": 1 if kind == "whole" else ranks.world_size() for n in range(3)}
            OPEN.close()


def swept_until(folder: Path, kind: str, until: str) -> None:
    """Continues what lies in `folder`, for so many micro-batches of a rank; at the end writes the scores."""
    if ranks.launched_world_size() > 1:
        ranks.start(120)
    running = (sweep := sweep_of(kind, folder)).run()
    for number, _ in enumerate(running):
        if number == int(until):
            running.close()
            return
    scores = scores_of(sweep)
    if ranks.is_main():
        torch.save(scores, folder / "scores.pt")


def rewarded(folder: Path) -> None:
    """By what DPO teaches, which is located and trained on all ranks."""
    if rank() == 0:
        write_earlier_stages(folder)
    while not (folder / "pairs.jsonl").exists():
        time.sleep(0.1)
    settings = {"source": "implicit", "ratio": 0.2, "windows": 2}
    _, expected = run_rewards(unit_in(folder / f"alone-{rank()}", folder, **settings))
    ranks.start(120)
    for zero in (Zero(2), Zero(3)):
        facts, rows = run_rewards(unit_in(folder / f"zero-{zero.stage}", folder, zero, **settings))
        for row, other in zip(rows, expected, strict=True):
            assert row == {**other, "rewards": pytest.approx(other["rewards"], abs=1e-3)}
        assert (facts["zero_stage"], facts["world_size"]) == (zero.stage, 2) and facts["selected"] == facts["changed"]


def held_out(folder: Path) -> None:
    """Looks at pairs that do not train, and training that leaves the best weights, are those of one process."""

    def watched(kind: str, name: str, zero: Zero | None) -> Trainer:
        rate = 5e-2 if kind == "sparse" else 5e-3
        settings = {"num_train_epochs": 3, "learning_rate": rate, "lr_scheduler_type": "constant"}
        trainer = build(kind, folder / f"{kind}-{name}-{rank() if zero is None else 0}", zero, **settings)
        examples = Examples(pair_corpus(3, seed=9), trainer.config)
        sparse = trainer.policy if kind == "sparse" else None
        trainer.held_out = HeldOut(examples, trainer.objective, every=1, keeps_best=True, sparse=sparse)
        trainer.watches = Watches(len(trainer.steps), 64, held_out=trainer.held_out)
        return trainer

    kinds = ("sparse", "dense")
    alone = {kind: (trainer := watched(kind, "alone", None), outcome(trainer)) for kind in kinds}
    ranks.start(60)
    for kind, (wanted, expected) in alone.items():
        assert wanted.held_out.best_step < wanted.made, "or the test shows nothing"
        assert bool(expected["kl"].min() > 0) == (kind == "sparse")
        for stage in (0, 3):  # as they come: ZeRO-3 keeps small tensors gathered between steps
            ours = watched(kind, f"stage-{stage}", Zero(stage))
            found = outcome(ours)
            assert ours.held_out.best_step == wanted.held_out.best_step
            losses = [torch.tensor([loss for _, loss in t.held_out.state]) for t in (ours, wanted)]
            torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found["kl"], expected["kl"], rtol=1e-3, atol=1e-5)
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(
                    found["weights"][name], weight, rtol=0, atol=1e-4, msg=f"{kind} {stage} {name}"
                )
            OPEN.close()


def guarded(folder: Path) -> None:
    """What a guard takes back is back on all ranks, to before the first step."""
    base = named_weights(tiny_llama(**ODD, tie_word_embeddings=False))
    ranks.start(60)
    for stage in (0, 3):
        ours = build("sparse", folder / f"stage-{stage}", Zero(stage), learning_rate=5e-2)
        guard = Guard(pair_corpus(), 2, 1.0)
        guard.ends = lambda seen: seen[CHANGE] != 0
        ours.watches = Watches(len(ours.steps), 64, guard=guard)
        found = outcome(ours)
        assert (ours.made, ours.watches.leaves) == (2, 0)
        assert found["weights"].keys() == base.keys()
        assert all(torch.equal(weight, base[name]) for name, weight in found["weights"].items())
        OPEN.close()


def other_reference(folder: Path) -> None:
    """A frozen reference of its own gives the log-probabilities that the same model gives in one process."""
    corpus = pair_corpus()
    plain = ResponseLogps(tiny_llama(seed=5))
    with torch.no_grad():
        batch = collate(corpus, corpus.examples, plain.layout)
        wanted = dict(zip(batch.responses.tolist(), plain(batch), strict=True))
    ranks.start(120)
    for stage in (1, 3):
        place = folder / str(stage)
        place.mkdir(exist_ok=True)
        logps = ResponseLogps(tiny_llama(seed=5).requires_grad_(False))
        config, policy = TrainConfig(**SETTINGS), DensePolicy(tiny_llama())
        trainer = Trainer(
            policy,
            corpus,
            Preference(0.5),
            config,
            place,
            zero=Zero(stage),
            reference=partial(opened, logps),
        )
        OPEN.callback(trainer.backend.close)
        first = next(trainer.run())
        assert first.metrics["rewards/margins"] != 0, "the reference is not the policy"
        for number, logps in wanted.items():
            found = torch.tensor(trainer.examples.reference[number])
            torch.testing.assert_close(found, logps[: len(found)], rtol=0, atol=1e-5)


@contextmanager
def opened(logps: ResponseLogps) -> Iterator[Opened]:
    with frozen_engine(logps) as engine:
        yield Opened(engine, logps.layout, logps.model.device)


def as_planned(folder: Path) -> None:
    """Live tensors within 5 % of the plan, traffic within 1 %, selected weights against dense in the same run."""
    from benchmarks.zero import measure

    ranks.start(120)
    placements = [(Zero(stage), False) for stage in (range(4) if ranks.world_size() == 2 else (1, 3))]
    if ranks.world_size() == 2:
        placements += [(Zero(stage, offload=True), False) for stage in (1, 2, 3)] + [(Zero(3), True)]
    shape = shape_of(config := LlamaConfig(**WIDE), "bfloat16")
    for number, (zero, recompute) in enumerate(placements):
        rows = []
        for ratio in (None, 0.05):
            place = folder / f"{number}-{ratio}"
            place.mkdir(exist_ok=True)
            model = LlamaForCausalLM(config).bfloat16().eval()
            if recompute:
                model.train().gradient_checkpointing_enable({"use_reentrant": False})
            rows.append(row := measure(zero, ratio, shape, "bfloat16", model, place))
            assert row.state_bytes == pytest.approx(row.planned_state_bytes, rel=0.05), f"{zero} {row}"
            assert row.traffic_bytes == pytest.approx(row.planned_traffic_bytes, rel=0.01), f"{zero} {row}"
        if zero.stage < 3 and ranks.world_size() > 1:
            assert rows[1].traffic_bytes < rows[0].traffic_bytes / 9


def locating_as_planned(folder: Path) -> None:
    """Whole or in shares, a sweep holds base and sums within 5 % of the plan, in as many windows and passes."""
    ranks.start(120)
    data, model = {"train": "a", "test": "b"}, {"name_or_path": "m", "dtype": "float32"}
    train = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ranks.world_size()}
    shape = shape_of(tiny_llama(num_hidden_layers=4).config, "float32")
    for windows in (1, 6):
        config = Config(name="x", data=data, model=model, warmup=train, locate={"windows": windows})
        for zero in (Zero(0), Zero(3)):
            logps = ResponseLogps(tiny_llama(num_hidden_layers=4).requires_grad_(False))
            with ExitStack() as stack:
                engine = stack.enter_context(frozen_engine(logps)) if zero.sharded else None
                examples = Examples(pair_corpus(4), config.warmup)
                options = {"windows": windows, "compute": differentiable(engine) if engine else None}
                place = folder / f"{windows}-{zero.stage}"
                sweep = Sweep(logps, examples, Preference(0.1), config.warmup, "linear", place, **options)
                deque(sweep.run(), maxlen=0)
            job = Job(config, shape, ranks.world_size(), 80e9, DEVICES["h100"], unknown_rows(config))
            planned = locate_phase(job, zero)
            assert (planned.windows, planned.passes) == (len(sweep.windows), sweep.passes)
            if windows >= ranks.world_size() or zero.sharded:  # else this rank may have had nothing to do
                assert planned.state_bytes - planned.memory["accumulators"] == pytest.approx(
                    sweep.state_bytes["base"], rel=0.05
                )
                assert sweep.state_bytes["accumulators"] == pytest.approx(planned.memory["accumulators"], rel=0.05)


def closed(folder: Path) -> None:
    """After a stage nothing of it stays in memory."""
    ranks.start(120)
    before = memory.live_bytes()
    for stage in range(4):
        for case in ("dense", "sparse", "recomputed"):
            model = recomputing_llama() if case == "recomputed" else None
            kind = "dense" if case == "dense" else "sparse"
            trainer = build(kind, folder / f"{case}-{stage}", Zero(stage), model=model)
            next(trainer.run())
            if case == "sparse" and stage == 3:
                with pytest.raises(UserError, match="the model lies in ZeRO-3 shares"):
                    trainer.policy.release()
            assert memory.live_bytes() > before + 2 * trainer.policy.parameters
            OPEN.close()
            del trainer, model
            _await_bytes(before, f"{case} stage {stage}")
    with frozen_engine(ResponseLogps(tiny_llama().requires_grad_(False))) as engine:
        engine.module.layout  # noqa: B018  (it runs the model)
    del engine
    _await_bytes(before, "frozen")


def _settled_bytes() -> int:
    """Once gloo's thread has let go of what it carried."""
    time.sleep(0.3)
    return memory.live_bytes()


def _await_bytes(count: int, label: str) -> None:
    """A thread of gloo's lets go of what it summed a moment after the sum is known."""
    until = time.monotonic() + 20
    while (live := memory.live_bytes()) != count and time.monotonic() < until:
        time.sleep(0.05)
    assert live == count, label


def starts_small(folder: Path) -> None:
    """Before DeepSpeed has divided the weights there is nothing of theirs but themselves, and of shares only shares."""
    import deepspeed

    ranks.start(120)
    found, initialize = [], deepspeed.initialize
    deepspeed.initialize = lambda **given: (found.append(memory.live_bytes()), initialize(**given))[1]
    for stage in (1, 2, 3):
        model = tiny_llama()
        size = sum(weight.nbytes for weight in model.parameters())
        build("dense", folder / str(stage), Zero(stage), model=model)
        OPEN.close()
        assert found[-1] < 1.01 * size, f"stage {stage}"
        del model
    model = tiny_llama(hidden_size=128)
    selection, size = random_selection(model), sum(weight.nbytes for weight in model.parameters())
    divide(*model.parameters())
    before = _settled_bytes()
    policy = ShardedPolicy(model, selection)
    added = (_settled_bytes() - before) / size
    assert added == pytest.approx((4 + 2) * 0.05 / 4 / ranks.world_size(), rel=0.1), "a value and a position"
    assert policy.selected == selection.selected


def options(folder: Path) -> None:
    """Whatever zero_optimization may say, the run is the same and continues from its checkpoint; `offload` has one."""
    epoch = {"num_train_epochs": 1}  # of three steps: without a learning rate, with one, and from the checkpoint
    wanted = {
        kind: outcome(build(kind, folder / f"local-{kind}-{rank()}", None, **epoch)) for kind in ("dense", "sparse")
    }
    ranks.start(120)
    small = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "reduce_scatter": False}
    small |= {"allgather_partitions": False, "stage3_prefetch_bucket_size": 100, **LARGE}
    assert {*small, "overlap_comm", "contiguous_gradients", "stage", "offload_optimizer"} == {*_OPTIONS}
    for kind in wanted:
        for stage in (1, 2, 3):
            for number, given in enumerate((small, {"overlap_comm": True}, {"contiguous_gradients": False})):
                label = f"{kind}-{stage}-{number}"
                first = build(kind, folder / label, zero := Zero(stage, options=given), save_steps=2, **epoch)
                assert_alike(outcome(first), wanted[kind], label)
                if given is small:  # which changes the shares
                    again = build(kind, folder / label, zero, **epoch)
                    resumed = {**outcome(again), **{key: wanted[kind][key] for key in ("losses", "norms")}}
                    assert_alike(resumed, wanted[kind], f"{label} resumed")
                OPEN.close()


def generator(folder: Path) -> None:
    """A checkpoint brings back torch's generator too."""
    ranks.start(120)
    trainer = build("sparse", folder, Zero(1), save_steps=1)
    next(trainer.run())
    drawn = torch.rand(3)
    again = build("sparse", folder, Zero(1), save_steps=1)
    assert again.backend.load(folder / "checkpoint-1.safetensors")["step"] == 1 and torch.equal(torch.rand(3), drawn)


def not_finite(folder: Path) -> None:
    """A gradient that is not finite ends the run on every rank, in the first step and later, whoever had it."""
    ranks.start(120)
    for kind in ("dense", "sparse"):
        for stage in range(4):
            for step in (1, 3):
                trainer = build(kind, folder / f"{kind}-{stage}-{step}", Zero(stage))
                metrics, backward = trainer.run(), trainer.backend.backward
                for _ in range(step - 1):
                    next(metrics)
                bad = torch.inf if ranks.rank() else 1.0
                trainer.backend.backward = lambda loss, last, held=backward, bad=bad: held(loss * bad, last)
                with pytest.raises(TrainingError, match=f"step {step}: .*norm (nan|inf)"):
                    next(metrics)


def mistakes(folder: Path, config: str) -> None:
    """One clear error, said by rank 0; every rank leaves with 2."""
    commands._PATIENCE = 0.0
    zero2 = "deepspeed=configs/zero2.json"
    assert main(["run", config]) == 2, "without deepspeed"
    assert main(["run", config, zero2, f"seeds=[{rank()}]"]) == 2, "another configuration"
    assert main(["run", config, zero2, "pretrain.gradient_accumulation_steps=3"]) == 2, "indivisible"
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "notes.txt").touch()
    assert main(["run", config, zero2, "name=taken"]) == 2, "on rank 0 only"
    zero2 = f"deepspeed={Path('configs/zero2.json').resolve()}"
    (node := folder / f"node-{rank()}").mkdir()
    os.chdir(node)
    Path("rows.jsonl").write_text(f"{rank()}")
    other = ["data.train=rows.jsonl", f"model.name_or_path={folder / 'other'}"]
    assert main(["run", config, zero2, *other]) == 2, "other data under the same name"
    with pytest.raises(UserError, match="rank 1 has another corpus than rank 0"):
        Trainer(DensePolicy(tiny_llama()), pair_corpus(seed=rank()), Preference(0.5), TrainConfig(**SETTINGS), node)
    policy = DensePolicy(tiny_llama())
    own = policy.logps.findings
    if rank():
        policy.logps.findings = replace(own, layout=Layout(share_prompts=False))
    with pytest.raises(UserError, match="rank 1 has another layout of rows than rank 0"):
        Trainer(policy, pair_corpus(), Preference(0.5), TrainConfig(**SETTINGS), node)
    reference = nullcontext(Opened(policy.logps, policy.logps.findings.layout, policy.model.device))
    policy.logps.findings = own
    given = (pair_corpus(), Preference(0.5), TrainConfig(**SETTINGS), node)
    with pytest.raises(UserError, match="rank 1 has another layout of its reference than rank 0"):
        list(Trainer(policy, *given, reference=lambda: reference).prepare())
    with pytest.raises(UserError, match="rank 1 has another reference model, or way to compute it than rank 0"):
        next(reference_logps(node / "kept", f"model {rank()}", given[0], np.arange(1), reference))


def command(folder: Path, *words: str) -> int:
    """`allo-fast WORDS` in this process; returns its exit code."""
    return main(list(words))


def stuck(folder: Path) -> None:
    assert rank() != 1, "rank 1 fails"
    time.sleep(1000)


def shared_inference(folder: Path, config: str) -> None:
    """A model in shares of all ranks, with a delta or without, generates and scores as one that is whole on each."""
    ranks.start(120)
    zeros = dict.fromkeys(("dense", "sparse"), Zero(3))
    path, delta = folder / "model", folder / "delta.safetensors"
    tokenizer = character_tokenizer()
    save_model(model := tiny_llama(vocab_size=len(tokenizer)), tokenizer, path)
    SparsePolicy(model, random_selection(model)).save_delta(delta)
    ranks.barrier()
    ids = tokenizer(["1+1=", "2+1=", "2", "31"]).input_ids
    rows = [{"prompt_ids": prompt, "responses": [{"ids": ids[2]}, {"ids": ids[3]}]} for prompt in ids[:2]]
    found = {}
    for name, device_bytes in (("whole", 1 << 40), ("shared", 1)):
        models.memory.device_bytes = lambda held=device_bytes: held
        given = [f"name={name}", f"output_dir={folder}", f"model.name_or_path={path}"]
        unit = Unit(Run(load_config(config, given), STAGES, zeros=zeros), "sample", "seed-0")
        deque(unit.execute(), maxlen=0)
        scored = Unit(unit.owner, "evaluate", "base")
        scored.folder.mkdir(parents=True, exist_ok=True)
        deque(evaluate.evaluate(scored, path, delta=delta), maxlen=0)
        with models.inference(unit, path, delta, scoring=True) as held:
            assert held.sharded == (name == "shared")
            logps = evaluate.response_logps(held, rows[: 1 + ranks.rank()])
        files = [unit.folder / "responses.jsonl", scored.folder / "predictions.jsonl"]
        ranks.barrier()
        found[name] = [logps, *(file.read_text() for file in files)]
    assert found["shared"] == found["whole"]


MIXTURE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 18}


def sft(folder: Path, config: str) -> None:
    """Sparse in float32 and dense into bfloat16, two ranks make the base that one process makes."""
    settings = [f"output_dir={folder}", f"model.name_or_path={folder / 'other'}", "sft.learning_rate=1e-3"]
    settings += [
        "locate.windows=1",
        "sft.num_train_epochs=1",
        "sft.per_device_train_batch_size=1",
        "sft.gradient_accumulation_steps=2",
    ]

    def made(name: str, ratio: float, zero: Zero | None) -> LlamaForCausalLM:
        own = [f"name={name}-{ratio}", f"sft.ratio={ratio}", f"model.dtype={'float32' if ratio < 1 else 'bfloat16'}"]
        zeros = dict.fromkeys(("dense", "sparse"), zero)
        unit = Unit(Run(load_config(config, [*settings, *own]), STAGES, zeros=zeros), "sft", "base")
        deque(unit.execute(), maxlen=0)
        return AutoModelForCausalLM.from_pretrained(unit.folder / "model", dtype="auto")

    alone = {ratio: made(f"alone-{rank()}", ratio, None) for ratio in (0.2, 1)}
    ranks.start(120)
    for ratio, expected in alone.items():
        for stage in (2, 3):
            weights = dict(made(f"stage-{stage}", ratio, Zero(stage)).named_parameters())
            for name, weight in expected.named_parameters():
                assert weights[name].dtype == weight.dtype == (torch.float32 if ratio < 1 else torch.bfloat16)
                assert (weights[name].float() - weight.float()).abs().mean() < 1e-6, f"{ratio} stage {stage}: {name}"


def saved_from_shares(folder: Path) -> None:
    """A model loaded in shares is the one in its folder, saved it reads back, and all ranks refuse what one sees."""
    torch.manual_seed(0)
    mixture = Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY | MIXTURE))
    tied = tiny_llama(**ODD, tie_word_embeddings=True)
    ranks.start(120)
    for dtype, source in (("float32", tied), ("bfloat16", tiny_llama(**ODD)), ("bfloat16", mixture)):
        first, again = (folder / f"{type(source).__name__}-{dtype}-{name}" for name in ("first", "again"))
        expected = fingerprint(source.to(getattr(torch, dtype)))
        save_model(source, character_tokenizer(), first)
        model = load_model(first, ModelConfig(), dtype=dtype, sharded=True)
        assert fingerprint(model) == expected
        save_model(model, character_tokenizer(), again, whole_weights(model))
        assert fingerprint(load_model(again, ModelConfig(), dtype=dtype)) == expected
    _refused_from_shares(folder, tiny_llama(**ODD))


def _refused_from_shares(folder: Path, model: LlamaForCausalLM) -> None:
    damages = {
        "model.norm.weight holds NaN": lambda state: state["model.norm.weight"][-1:].fill_(torch.nan),  # the last share
        "missing: model.norm.weight": lambda state: state.pop("model.norm.weight"),
        "unknown to it: other": lambda state: state.update(other=torch.zeros(2)),
    }
    for number, (message, damage) in enumerate(damages.items()):
        damage(state := {name: weight.clone() for name, weight in model.state_dict().items()})
        if ranks.is_main():
            model.save_pretrained(folder / f"damaged-{number}")
            save_file(state, folder / f"damaged-{number}" / "model.safetensors", {"format": "pt"})
        ranks.barrier()
        for sharded in (True, False):
            with pytest.raises(UserError, match=message):
                load_model(folder / f"damaged-{number}", ModelConfig(), sharded=sharded)


def deltas(folder: Path) -> None:
    _deltas(folder, range(4), seed=None)


def deltas_by_chance(folder: Path) -> None:
    _deltas(folder, (0, 2, 3), seed=7)  # the optimizer rounds, the policy, the policy in shares


def _deltas(folder: Path, stages: Iterable[int], seed: int | None) -> None:
    """Set into shares without a message, begun from in fp32 on any stage of ZeRO, saved, and rebuilt bit for bit.

    A resumed run ends with the same bits. seed: of the rounding into the base; None: to nearest.
    """
    ranks.start(120)
    base, (first, second) = tiny_llama(**ODD).bfloat16(), (folder / "first.safetensors", folder / "second.safetensors")
    save_model(base, character_tokenizer(), folder / "base")
    trained = SparsePolicy(deepcopy(base), random_selection(base, 0.3), rounding_seed=seed)
    with torch.no_grad():
        for value in trained.values.values():
            value += 1e-2 * torch.rand(value.shape, generator=torch.Generator().manual_seed(len(value)))
    trained.write_back()
    trained.save_delta(first)
    ranks.barrier()
    model, counted = load_model(folder / "base", ModelConfig(dtype="bfloat16"), sharded=True), ranks.Traffic()
    Delta.load(first).set_into(model)
    assert not counted.bytes
    assert_same_weights(whole_weights(model), trained.full_weights())
    Delta.load(first).merge_into(again := load_model(folder / "base", ModelConfig(dtype="bfloat16"), sharded=True))
    assert fingerprint(again) == fingerprint(model)
    alone = SparsePolicy(deepcopy(base), random_selection(base, 0.3, seed=2), Delta.load(first), rounding_seed=seed)
    for stage in stages:
        trainer = _starting_from(first, folder, stage, seed)
        assert_same_weights(trainer.policy.full_weights(), trained.full_weights())
        for name, at, value in trainer.policy.trained():
            assert torch.equal(at.unpack(), alone.positions[name].unpack()), f"stage {stage}: {name}"
            assert torch.equal(value, alone.values[name]), f"stage {stage}: {name}"
        deque(trainer.run(), maxlen=0)
        trainer.policy.save_delta(second, before=first)
        ranks.barrier()
        rebuilt = deepcopy(base)
        Delta.load(second).merge_into(rebuilt)
        assert_same_weights(whole_weights(rebuilt), trainer.policy.full_weights())
        moved = zip(whole_weights(rebuilt), whole_weights(trained.model), strict=True)
        assert trainer.policy.changed() == sum(int((now[1] != before[1]).sum()) for now, before in moved) > 0
        assert trainer.policy.base == fingerprint(trained.model)
        resumed = _starting_from(first, folder, stage, seed)
        assert [metrics.step for metrics in resumed.run()] == [3]
        assert_same_weights(resumed.policy.full_weights(), whole_weights(rebuilt))
        OPEN.close()
        ranks.barrier()


def _starting_from(delta: Path, folder: Path, stage: int, seed: int | None) -> Trainer:
    """As a stage of a unit of this seed does."""
    zero, selection = Zero(stage), random_selection(tiny_llama(**ODD).bfloat16(), 0.3, seed=2)
    config = SimpleNamespace(model=ModelConfig(dtype="bfloat16", rounding="stochastic" if seed else "nearest"))
    unit = SimpleNamespace(config=config, zero=zero, seed=seed)
    policy = models.selected_policy(unit, folder / "base", selection, Delta.load(delta))
    (place := folder / str(stage)).mkdir(exist_ok=True)
    settings = TrainConfig(**SETTINGS | {"num_train_epochs": 1, "save_steps": 2})
    trainer = Trainer(policy, pair_corpus(), Preference(0.5, 0.5), settings, place, zero=zero)
    OPEN.callback(trainer.backend.close)
    return trainer


def assert_same_weights(ours, expected) -> None:
    """Bit for bit, both gathered together."""
    for (name, weight), (other, wanted) in zip(ours, expected, strict=True):
        assert name == other and same_bits_of(weight.cpu(), wanted.cpu()), name


def rank() -> int:
    return ranks.launched_rank()


def run(case: str, folder: str, *arguments: str) -> int:
    """Returns the exit code; after an error without waiting for the other ranks."""
    torch.set_num_threads(1)
    if code := globals()[case](Path(folder), *arguments):
        return code
    OPEN.close()
    ranks.barrier()
    ranks.stop()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads
    return 0


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(run(*sys.argv[1:]))
    ranks.import_deepspeed()  # which compiles something to see whether it could
    serve(run)
