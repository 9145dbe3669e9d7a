"""Scores of weights by gradients at the frozen base, for whichever stage trains a selection of them."""

import logging
import random
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from allo_fast import ranks
from allo_fast.config import TrainConfig, UserError
from allo_fast.data.batch import Batch
from allo_fast.data.corpus import Corpus
from allo_fast.durable import SCRATCH, read_json, write_json
from allo_fast.locating.files import StoredScore, stored_scores
from allo_fast.locating.sweep import Sweep
from allo_fast.locating.windows import pieces_of
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Preference, Sft
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection, competing
from allo_fast.model.loading import load_model
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import fingerprint, is_sharded, named_weights, size_of
from allo_fast.plan.shapes import model_config, shape_of
from allo_fast.plan.windows import LEAN, base_bytes, room_beside, windows
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import responses_done
from allo_fast.stages.models import dense_policy, frozen_reference, selected_policy
from allo_fast.training.examples import Examples
from allo_fast.training.reference import Opened, kept, reference_logps
from allo_kernels import memory

logger = logging.getLogger(__name__)

_SPARE = 0.5  # of a CPU's free memory, which is not the job's own, that locating may take


@dataclass(frozen=True)
class FrozenBase:
    """compute: its response log-probabilities, with a graph for backward. path: where it came from."""

    path: str | Path
    logps: ResponseLogps
    compute: Callable[[Batch], Tensor]
    fingerprint: str


@contextmanager
def frozen_base(unit: Unit, path: str | Path) -> Iterator[FrozenBase]:
    """The model at `path` with nothing to train."""
    sharded = unit.zero is not None and unit.zero.sharded
    model = load_model(path, unit.config.model, sharded=sharded).requires_grad_(False)
    base, logps = fingerprint(model), ResponseLogps(model)
    if not sharded:
        yield FrozenBase(path, logps, logps, base)
        return
    from allo_fast.training.backend_deepspeed import differentiable, frozen_engine

    with frozen_engine(logps) as engine:
        yield FrozenBase(path, logps, differentiable(engine), base)


def gradient_scores(
    unit: Unit,
    base: FrozenBase,
    corpus: Corpus,
    objective: Sft | Preference,
    train: TrainConfig,
    score: str,
    reference: str | None = None,
) -> Generator[Progress, None, tuple[dict[str, StoredScore], dict]]:
    """Scores of all weights, in files that the unit keeps until it is complete; and what its manifest says of them.

    reference: another model that the objective compares with.
    """
    examples = Examples(drawn(corpus, unit.config.locate.pairs, train, unit.seed), train, unit.seed)
    examples.layout = base.logps.layout
    if score == "snr" and len(examples.steps) < 2:
        raise UserError("locate.score: snr: expected at least two optimizer steps, got one, in which all scores are 1")
    if opened := frozen_reference(unit, reference if objective.needs_reference else None):
        examples.reference = yield from responses_done(_other_reference(unit, examples, opened()))
    sizes = {name: size_of(weight) for name, weight in named_weights(base.logps.model).items()}
    total = sum(sizes.values())
    sweep = Sweep(
        base.logps,
        examples,
        objective,
        train,
        score,
        unit.folder / SCRATCH,
        windows=_windows(unit, base, examples, score),
        clip=unit.config.locate.clip,
        host=unit.config.locate.accumulators == "host",
        compute=base.compute,
        mark=unit.mark,
    )
    for done, steps in sweep.run():
        yield Progress(done, steps, f"micro-batch of {sweep.passes} passes")
    states = sum(sweep.state_bytes.values())
    facts = {"examples": len(examples), "steps": len(examples.steps), "windows": len(sweep.windows)}
    facts |= {"passes": sweep.passes, "state_bytes": sweep.state_bytes, "state_bytes_per_parameter": states / total}
    if examples.set_aside:
        facts["set_aside"] = examples.set_aside
    return stored_scores(unit.folder / SCRATCH, sizes, unit.mark), facts


def _windows(unit: Unit, base: FrozenBase, examples: Examples, score: str) -> int:
    """As `allo-fast plan` counts them, of the rows that there are and the memory that is free."""
    model, world = base.logps.model, ranks.world_size()
    whole, shares = (1, world) if is_sharded(model) else (world, 1)
    pieces, room = pieces_of(model), None
    if unit.config.locate.windows == "auto":
        room = ranks.on_main(lambda: _room(unit, base, examples, shares))
    return windows(unit.config.locate, score, pieces, room, whole, shares)


def _room(unit: Unit, base: FrozenBase, examples: Examples, shares: int) -> float | None:
    """Bytes that a GPU, or a CPU's free memory, has for sums; None where activations cannot be estimated."""
    settings = unit.config.model
    micros = (micro for step in range(len(examples.steps)) for micro in examples.micro_batches(step))
    tokens = max(examples.collate(micro).input_ids.numel() for micro in micros)
    try:
        shape = shape_of(model_config(unit.config, str(base.path)), settings.dtype)
    except UserError as error:
        logger.warning("locating: in the most windows that are of use: %s", error)
        return None
    if base.logps.model.device.type == "cuda":
        return room_beside(shape, settings, tokens, memory.device_bytes(), shares)
    # The base is there already; a machine without room computes in windows as lean as those of which nothing is known.
    device = _SPARE * memory.available_bytes() + base_bytes(shape, settings, shares)
    lean = LEAN * sum(shape.sizes) / shares
    return max(lean, room_beside(shape, settings, tokens, device, shares))


def drawn(corpus: Corpus, count: int | None, train: TrainConfig, seed: int) -> Corpus:
    """With `count` of its examples, in their order. Raises UserError for fewer than an optimizer step has."""
    if count is None or count >= len(corpus.examples):
        return corpus
    if count < train.examples_per_step:
        raise UserError(f"locate.pairs: expected at least the {train.examples_per_step} of a step, got {count}")
    chosen = sorted(random.Random(seed).sample(range(len(corpus.examples)), count))
    return corpus.only(chosen)


def _other_reference(unit: Unit, examples: Examples, opened: AbstractContextManager[Opened]) -> Generator:
    asked = examples.responses(range(len(examples)))
    return reference_logps(*kept(unit.folder / SCRATCH, unit.mark), examples.corpus, asked, opened, examples.budget)


def located(
    unit: Unit, path: str | Path, corpus: Corpus, objective: Sft | Preference, train: TrainConfig, ratio: float
) -> Generator[Progress, None, tuple[Selection, dict]]:
    """What a stage trains that locates for itself: by `linear`, in one epoch; kept with the unit. And how it did."""
    kept = unit.folder / "selection.safetensors"
    facts = ranks.on_main(lambda: _located_before(unit, kept))
    if facts is None:
        once = train.model_copy(update={"num_train_epochs": 1})
        exclude = tuple(unit.config.locate.exclude)
        with frozen_base(unit, path) as base:
            competing(named_weights(base.logps.model), exclude)  # before hours are spent
            scores, facts = yield from gradient_scores(unit, base, corpus, objective, once, "linear")
        selection = Selection.from_scores(scores, ratio, base=base.fingerprint, exclude=exclude)
        ranks.on_main(lambda: _keep(unit, selection, kept, facts))
    return Selection.load(kept), {"locating": facts}


def located_policy(
    unit: Unit, path: str | Path, corpus: Corpus, objective: Sft | Preference, train: TrainConfig, ratio: float
) -> Generator[Progress, None, tuple[DensePolicy | SparsePolicy, dict]]:
    """The model at `path`, of which `ratio` trains, located by its own objective; 1: all of it, densely."""
    if ratio == 1:
        return dense_policy(unit, path), {}
    selection, facts = yield from located(unit, path, corpus, objective, train, ratio)
    return selected_policy(unit, path, selection), facts


def _located_before(unit: Unit, path: Path) -> dict | None:
    """The facts of the selection that an earlier session left; None without one that is whole."""
    facts = path.with_name("locating.json")
    try:
        said = read_json(facts) if facts.exists() else {}
        return Selection.load(path) and said["facts"] if said.get("mark") == unit.mark else None
    except UserError as error:
        logger.warning("%s; located again", error)
        return None


def _keep(unit: Unit, selection: Selection, path: Path, facts: dict) -> None:
    """The scores, many times its size, go."""
    selection.save(path)
    write_json(path.with_name("locating.json"), {"mark": unit.mark, "facts": facts})
    shutil.rmtree(unit.folder / SCRATCH)
