"""Responses to every training problem: sampled from the base model, or given with the data.

    y ~ p_base(. | problem), temperature 0.7, top_p 0.95, 10 each
    `allo-fast sample CONFIG`

Departs from the release: run seed, problem and number decide each response, whatever runs beside it, and responses are
sampled after the prompt they are trained on. `sample.engine: server` asks a server that has the base.
Writes responses.jsonl (texts and token ids), problems.jsonl, and quarantine.jsonl (rows set aside, with the reason).
"""

import shutil
from collections.abc import Generator
from pathlib import Path

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.data.encoding import encode_responses
from allo_fast.data.prompts import Prompts
from allo_fast.data.scoring import before_stop
from allo_fast.durable import appearing
from allo_fast.model.generation import generate
from allo_fast.model.loading import load_tokenizer
from allo_fast.model.server import Server
from allo_fast.runs.rows import Rows, by_chunks
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.judges import Labels, labels_in
from allo_fast.stages.models import BATCHES, base_path, inference, prompts_of
from allo_fast.stages.problems import PROBLEMS, first_row, limits, unit_problems

RESPONSES = "responses.jsonl"


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    prompts = prompts_of(unit.config, load_tokenizer(base_path(unit)))
    rows, quarantined = unit_problems(unit, "train", prompts, unit.config.sample.max_new_tokens)
    facts = {"problems": len(rows), "quarantined": quarantined}
    if rows[0]["responses"]:
        ranks.on_main(lambda: _link(unit.folder / PROBLEMS, unit.folder / RESPONSES))
        responses = sum(len(row["responses"]) for row in rows)
    else:
        rows = yield from (_ask if unit.config.sample.engine == "server" else _sample)(unit, rows, prompts)
        counts = [(len(row["responses"]), len(row["unusable"])) for row in rows]
        responses, unusable = map(sum, zip(*counts, strict=True))
        if not responses:
            first = next(reason for row in rows for reason in row["unusable"])
            raise UserError(f"no sampled response can be trained: {first}")
        facts["unusable_responses"] = unusable
    return {**facts, "responses": responses, "first_row": first_row(rows, prompts)}


def _link(problems: Path, responses: Path) -> None:
    """Given responses are in the problems' rows already: one file under two names, where the file system has that."""
    responses.unlink(missing_ok=True)
    try:
        responses.hardlink_to(problems)
    except OSError:
        with appearing(responses) as partial:
            shutil.copyfile(problems, partial)


def _suffix(unit: Unit, prompts: Prompts) -> str:
    """The release samples after one space more than it trains after."""
    return " " if unit.config.protocol == "release" and not prompts.chat else ""


def _ask(unit: Unit, problems: Rows, prompts: Prompts) -> Generator[Progress, None, Rows]:
    """As `_sample`, of a server. What it refuses or leaves empty is among a row's `unusable`."""
    settings, suffix, positions = unit.config.sample, _suffix(unit, prompts), limits(unit.config, 0).positions
    server, label = Server(settings, unit.config.model.name_or_path), labels_in(unit.config)

    def work(chunk: list[dict], start: int) -> list[dict]:
        requests = [prompts.request(row["prompt"], row["tools"], suffix) for row in chunk]
        lengths = [len(row["prompt_ids"]) for row in chunk]
        answers = server.respond(requests, lengths, unit.seed, start)
        rows = []
        for row, answer in zip(chunk, answers, strict=True):
            judged = _judged(row, answer.texts, label, settings.stop, prompts, positions)
            rows.append({**judged, "unusable": judged["unusable"] + answer.reasons})
        return rows

    size = BATCHES * settings.server.concurrency
    rows = yield from by_chunks(unit, RESPONSES, problems, size, "problem", work, sharded=False)
    return rows


def _sample(unit: Unit, problems: Rows, prompts: Prompts) -> Generator[Progress, None, Rows]:
    settings, suffix, positions = unit.config.sample, _suffix(unit, prompts), limits(unit.config, 0).positions

    def asked(row: dict) -> list[int]:
        return prompts.encode_prompt(row["prompt"], suffix=suffix) if suffix else row["prompt_ids"]

    label = labels_in(unit.config)
    with inference(unit, base_path(unit), scoring=True) as frozen:  # refused now, if it cannot be trained

        def work(chunk: list[dict], start: int) -> list[dict]:
            texts = generate(
                frozen.model,
                prompts.tokenizer,
                [asked(row) for row in chunk],
                prompts.end_tokens,
                max_new_tokens=settings.max_new_tokens,
                seed=unit.seed,
                first=start,
                num_return_sequences=settings.num_return_sequences,
                temperature=settings.temperature,
                top_p=settings.top_p,
                rows=settings.batch_size * settings.num_return_sequences,
                sharded=frozen.sharded,
            )
            return [
                _judged(row, sampled, label, settings.stop, prompts, positions)
                for row, sampled in zip(chunk, texts, strict=True)
            ]

        size = frozen.at_once(settings.batch_size)
        rows = yield from by_chunks(unit, RESPONSES, problems, size, "problem", work, frozen.sharded)
    return rows


def _judged(row: dict, texts: list[str], label: Labels, stops: list[str], prompts: Prompts, positions: float) -> dict:
    row = encode_responses(row, [before_stop(text, stops) for text in texts], prompts, positions)
    labels = label([response["text"] for response in row["responses"]], row)
    return row | {"responses": [one | said for one, said in zip(row["responses"], labels, strict=True)]}
