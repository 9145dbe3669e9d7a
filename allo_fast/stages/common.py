"""What several stages share: the base model, JSON lines, and driving a training loop as progress."""

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from allo_fast import ranks
from allo_fast.config import Config, SparseTrainConfig, UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.batch import Corpus
from allo_fast.data.prompts import Prompts
from allo_fast.method.policy import Delta, DensePolicy, SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.loading import load_model, load_tokenizer
from allo_fast.model.logps import ResponseLogps
from allo_fast.plan import costs
from allo_fast.plan.shapes import BYTES, model_config, weights_of
from allo_fast.runs.run import Progress, Unit
from allo_fast.training.engine import Trainer
from allo_fast.training.sharded import ShardedPolicy
from allo_fast.training.zero import training_sections
from allo_kernels import memory


def base_path(unit: Unit) -> str | Path:
    """Where the base model lies: given by the user, or pretrained by this run."""
    given = unit.config.model.name_or_path
    return given if given else unit.needed("pretrain") / "model"


def make_prompts(unit: Unit, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    data = unit.config.data
    return Prompts(tokenizer, data.chat_template, data.prompt_template, unit.config.rewards.template)


def dense_policy(unit: Unit, path: str | Path) -> DensePolicy:
    """All weights in float32, from the values that the configured dtype gives them: what the optimizer starts from is
    what the change is measured against."""
    dtype = getattr(torch, unit.config.model.dtype)
    if unit.zero and unit.zero.sharded:
        model = load_model(path, unit.config.model, dtype="float32", sharded=True)
        for weight in model.parameters():
            weight.ds_tensor.copy_(weight.ds_tensor.to(dtype))
    else:
        model = load_model(path, unit.config.model).float()
    return DensePolicy(model, autocast=None if dtype == torch.float32 else dtype)


def sparse_policy(unit: Unit, path: str | Path, config: SparseTrainConfig, after: Delta | None = None) -> SparsePolicy:
    """The model at `path` with the entries that `locate` chose for this stage.

    after: what an earlier stage changed since the selection was made; it must come from the selection's own base.
    """
    sharded = unit.zero is not None and unit.zero.sharded
    model = load_model(path, unit.config.model, sharded=sharded)
    selection = Selection.load(unit.needed("locate") / f"{unit.name}.safetensors")
    if after:
        if after.base != selection.base:
            raise UserError(f"{path}: does not come from the model that the selection was made for")
        selection = selection.rebased(model)
    if sharded:
        return ShardedPolicy(model, selection)
    clip = config.clip or ("all" if unit.config.protocol == "release" else "selected")
    return SparsePolicy(model, selection, keep_dense_gradients=clip == "all")


@dataclass(frozen=True)
class Inference:
    """A frozen model. compute: itself, or its log-probabilities of a batch. sharded: all ranks compute or none does."""

    model: PreTrainedModel
    compute: Callable
    share_prompts: bool
    sharded: bool


@contextmanager
def inference(
    unit: Unit, path: str | Path, *, scoring: bool = False, sharded: bool | None = None
) -> Iterator[Inference]:
    """The model at `path`, frozen, until the context ends.

    scoring: for log-probabilities of responses [R, L], not for generating. sharded: in shares of all ranks; None: where
    it would take more than half of a device.
    """
    wanted = unit.config.model
    if sharded is None:
        several = unit.zero is not None and ranks.world_size() > 1
        sharded = several and ranks.on_main(lambda: _bytes(unit, path) > memory.device_bytes() / 2)
    model = load_model(path, wanted, sharded=sharded).eval().requires_grad_(False)
    module = ResponseLogps(model) if scoring else model
    if sharded:
        from allo_fast.training.backend_deepspeed import frozen_engine

        with frozen_engine(module) as engine:
            yield Inference(model, engine, scoring and module.share_prompts, True)
    else:
        yield Inference(model, module, scoring and module.share_prompts, False)


def _bytes(unit: Unit, path: str | Path) -> int:
    dtype = unit.config.model.dtype
    return BYTES[dtype] * weights_of(model_config(unit.config, str(path)), dtype).parameters


def check_references(config: Config) -> None:
    """Before any stage runs: raises UserError where one compares with a model that cannot be, naming the key."""
    named = {name: getattr(train, "reference", None) for name, train in training_sections(config).items()}
    named = {name: path for name, path in named.items() if path}
    base = config.model.name_or_path
    wanted = (load_tokenizer(base) if base and named else character_tokenizer()).get_vocab()
    for name, path in named.items():
        try:
            found = load_tokenizer(path).get_vocab()
        except UserError as error:
            raise UserError(f"{name}.reference: {error}") from None
        if found != wanted:
            raise UserError(f"{name}.reference: {path} has another vocabulary than {base or 'the base model'}")


def frozen_reference(unit: Unit, path: str | None) -> Callable[[bool], AbstractContextManager[Callable]] | None:
    """What opens the reference model at `path`: log-probabilities [R, L] fp32 of a batch. On ranks it is sharded.

    Opened with whether responses share rows; then raises UserError for attention that cannot.
    """
    if path is None:
        return None

    @contextmanager
    def opened(share_prompts: bool) -> Iterator[Callable]:
        with inference(unit, path, scoring=True, sharded=unit.zero is not None) as found:
            if share_prompts and not found.share_prompts:
                raise UserError(f"{unit.name}.reference: {path} cannot keep the responses of one row apart")
            yield found.compute

    return opened


def pair_corpus(rows: list[dict], prompts: Prompts) -> Corpus:
    """Each problem once with all responses of its pairs; examples are (chosen, rejected)."""
    corpus, by_id = Corpus(), {}
    for row in rows:
        by_id.setdefault(row["id"], []).append(row)
    for members in by_id.values():
        texts = list(dict.fromkeys(row[side] for row in members for side in ("chosen", "rejected")))
        indices = corpus.add(prompts.encode_prompt(members[0]["prompt"]), map(prompts.encode_response, texts))
        number = dict(zip(texts, indices, strict=True))
        corpus.examples += [(number[row["chosen"]], number[row["rejected"]]) for row in members]
    return corpus


def train(unit: Unit, trainer: Trainer) -> Generator[Progress, None, dict]:
    """Drives a training loop; returns the facts every training stage records."""
    check_lengths(trainer.policy.model, trainer.corpus)
    for done, total in trainer.prepare():
        yield Progress(done, total, "reference batch")
    for metrics in trainer.run():
        notes = {"loss": metrics.loss, **metrics.metrics}
        yield Progress(metrics.step, metrics.total_steps, "step", notes)
    rows = ranks.on_main(lambda: read_jsonl(unit.folder / "metrics.jsonl"))  # of earlier sessions too
    parameters = trainer.policy.parameters
    facts = {
        "parameters": parameters,
        "examples": len(trainer.corpus.examples),
        "steps": len(trainer.steps),
        "tokens_per_second": sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows),
    }
    total = sum(trainer.state_bytes().values())
    facts |= {"state_bytes": trainer.state_bytes(), "state_bytes_per_parameter": total / parameters}
    if unit.zero:
        facts |= _of_ranks(unit, trainer)
    if isinstance(trainer.policy, SparsePolicy):
        facts["selected"] = trainer.policy.selected
        facts["changed"] = trainer.policy.changed()
    return facts


def _of_ranks(unit: Unit, trainer: Trainer) -> dict:
    """How the stage was divided, and what a rank handed to collectives in its last step: counted, and planned.

    Nothing was counted where an earlier session, perhaps without ranks, made every step; a stage of one step counts
    DeepSpeed's first, in which ZeRO-3 learns the order of modules and gathers more.
    """
    policy, zero, world = trainer.policy, unit.zero, ranks.world_size()
    ratio = policy.selected / policy.parameters if isinstance(policy, SparsePolicy) else None
    micros = trainer.config.gradient_accumulation_steps
    weights = weights_of(policy.model.config, unit.config.model.dtype)
    planned = [
        sum(costs.traffic(weights, unit.config.model, micros, share, zero, world).values()) for share in (ratio, None)
    ]
    return {
        "world_size": world,
        "zero_stage": zero.stage,
        "traffic_bytes_per_step": sum(trainer.traffic_by_operation.values()),
        "planned_traffic_bytes_per_step": planned[0],
        "planned_dense_traffic_bytes_per_step": planned[1],
        "traffic_by_operation": trainer.traffic_by_operation,
    }


def check_lengths(model: PreTrainedModel, corpus: Corpus) -> None:
    """Raises UserError when a prompt with its response is longer than the model can read."""
    longest = max(len(corpus.prompts[response.prompt]) + len(response.tokens) for response in corpus.responses)
    if longest > max_length(model):
        raise UserError(
            f"a prompt with its response has {longest} tokens, the model reads {max_length(model)}; lower "
            "data.max_prompt_tokens, data.max_response_tokens or sample.max_new_tokens"
        )


def max_length(model: PreTrainedModel) -> float:
    """Tokens that the model can read; infinite where its configuration names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def read_jsonl(path: Path) -> list[dict]:
    return _parse(path.read_bytes())


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """By rank 0."""
    if ranks.is_main():
        path.write_bytes(_lines(rows))


def by_chunks(
    path: Path, items: Sequence, size: int, noun: str, work: Callable[[Sequence, int], list[dict]]
) -> Generator[Progress, None, list[dict]]:
    """work(chunk, start) for each chunk of `items`, one row an item, into the JSON lines of `path`.

    Each rank does one chunk of a round; what comes out does not depend on their number. Until all rows are there they
    are in `path`.partial; a killed stage continues after its last whole chunk.
    """
    ranks.agree_on(f"list of {noun}s", items)
    partial = path.with_name(path.name + ".partial")
    rows = ranks.on_main(lambda: _whole_chunks(partial, size))
    for first in range(len(rows), len(items), size * ranks.world_size()):
        start = first + size * ranks.rank()
        # With nothing left for it, a rank repeats another's chunk: a sharded model needs them all.
        done = work(items[start : start + size], start) if start < len(items) else work(items[first:][:size], first)[:0]
        for part in (parts := ranks.gather(done)):
            rows += part
        if ranks.is_main():
            with partial.open("ab") as file:
                file.write(_lines(row for part in parts for row in part))
        yield Progress(len(rows), len(items), noun)
    if ranks.is_main():
        partial.rename(path)
    return rows


def _whole_chunks(path: Path, size: int) -> list[dict]:
    """What a killed stage left, without its last chunk where that is torn; the file too is cut."""
    rows = _whole_lines(path)
    rows = rows[: len(rows) // size * size]
    write_jsonl(path, rows)
    return rows


def _whole_lines(path: Path) -> list[dict]:
    """Without the torn last line that a killed stage may leave."""
    data = path.read_bytes() if path.exists() else b""
    return _parse(data[: data.rfind(b"\n") + 1])


def _parse(data: bytes) -> list[dict]:
    """By bytes: a text has more line ends than JSON lines do."""
    return [json.loads(line) for line in data.split(b"\n") if line]


def _lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
