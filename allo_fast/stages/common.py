"""What several stages share: the base model, JSON lines, and driving a training loop as progress."""

import json
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from allo_fast.config import SparseTrainConfig, UserError
from allo_fast.data.batch import Corpus
from allo_fast.data.prompts import Prompts
from allo_fast.engine import Trainer
from allo_fast.models import load_model
from allo_fast.policy import Delta, DensePolicy, SparsePolicy
from allo_fast.runs import Progress, Unit
from allo_fast.selection import Selection


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
    model = load_model(path, unit.config.model).float()
    return DensePolicy(model, autocast=None if dtype == torch.float32 else dtype)


def sparse_policy(unit: Unit, path: str | Path, config: SparseTrainConfig, after: Delta | None = None) -> SparsePolicy:
    """The model at `path` with the entries that `locate` chose for this stage.

    after: what an earlier stage changed since the selection was made; it must come from the selection's own base.
    """
    model = load_model(path, unit.config.model)
    selection = Selection.load(unit.needed("locate") / f"{unit.name}.safetensors", None if after else model)
    if after:
        if after.base != selection.base:
            raise UserError(f"{path}: does not come from the model that the selection was made for")
        selection = selection.rebased(model)
    clip = config.clip or ("all" if unit.config.protocol == "release" else "selected")
    return SparsePolicy(model, selection, keep_dense_gradients=clip == "all")


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
    rows = read_jsonl(unit.folder / "metrics.jsonl")  # of earlier sessions too
    parameters = trainer.policy.parameters
    facts = {
        "parameters": parameters,
        "examples": len(trainer.corpus.examples),
        "steps": len(trainer.steps),
        "tokens_per_second": sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows),
    }
    total = sum(trainer.state_bytes().values())
    facts |= {"state_bytes": trainer.state_bytes(), "state_bytes_per_parameter": total / parameters}
    if isinstance(trainer.policy, SparsePolicy):
        facts["selected"] = sum(len(at) for at in trainer.policy.positions.values())
        facts["changed"] = trainer.policy.changed()
    return facts


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
    path.write_bytes(_lines(rows))


def by_chunks(
    path: Path, items: Sequence, size: int, noun: str, work: Callable[[Sequence, int], list[dict]]
) -> Generator[Progress, None, list[dict]]:
    """work(chunk, start) for each chunk of `items`, one row an item, into the JSON lines of `path`.

    Until all are there they are in `path`.partial; a killed stage continues after its last whole chunk.
    """
    partial = path.with_name(path.name + ".partial")
    rows = _whole_lines(partial)
    rows = rows[: len(rows) // size * size]
    write_jsonl(partial, rows)
    for start in range(len(rows), len(items), size):
        done = work(items[start : start + size], start)
        rows += done
        with partial.open("ab") as file:
            file.write(_lines(done))
        yield Progress(len(rows), len(items), noun)
    partial.rename(path)
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
