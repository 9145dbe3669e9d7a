"""Token rewards, 0..1: for each token of a wrong response, how well it stands there; low ones are forgotten.

    confidence   p(y_t | prompt, y_<t) by the frozen base: nothing is trained
    rewriter     p_RM(y_t | rewriting prompt(problem, gold solution, response), y_<t), see rewriting.py
    prompted     the same by the base itself, for instruct models that can
    implicit     how much less DPO on the pairs made of the token than of the others of its response, see implicit.py
    file         the user's own
    `allo-fast rewards CONFIG`

Departs from the release, whose rewriter learns densely from corrections that a teacher wrote. Writes rewards.jsonl {id,
prompt, response, the token ids of both, rewards: one float per token of the response, what ends it included}.
"""

from collections.abc import Callable, Generator
from pathlib import Path

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.data.sources import UnusableRow, parse_json
from allo_fast.runs.rows import read_jsonl, write_jsonl
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.implicit import implicit
from allo_fast.stages.models import base_path, inference
from allo_fast.stages.responses import REWARDS, reward_row, rewarded, wrong_responses
from allo_fast.stages.rewriting import prompted, rewriter


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    source, responses = unit.config.reward_source, wrong_responses(unit)
    facts = yield from _SOURCES[source](unit, responses)
    rewarded_responses = ranks.on_main(lambda: len(read_jsonl(unit.folder / REWARDS)))  # which rank 0 has written
    left_out = len(responses) - rewarded_responses
    return {**facts, "responses": rewarded_responses, "left_out": left_out, "source": source}


def _confidence(unit: Unit, responses: list[dict]) -> Generator[Progress, None, dict]:
    with inference(unit, unit.config.rewards.model or base_path(unit), scoring=True) as frozen:
        yield from rewarded(unit, responses, lambda batch: frozen.compute(batch).exp(), frozen.model.device)
    return {}


def _file(unit: Unit, responses: list[dict]) -> Generator[Progress, None, dict]:
    """The user's rewards for the responses of this run; every response must have one number per token."""
    path = unit.config.rewards.path
    by_response, rows = read_rewards(path), []
    for row in responses:
        rewards = by_response.get((str(row["prompt"]), row["response"]))
        length = len(row["response_ids"])
        if rewards is None or len(rewards) != length:
            got = "none" if rewards is None else str(len(rewards))
            raise UserError(f"{path}: {row['id']}: expected {length} rewards, one per token, got {got}")
        rows.append(reward_row(row, rewards))
    write_jsonl(unit.folder / REWARDS, rows)
    yield Progress(len(rows), len(rows), "response")
    return {"path": path}


_SOURCES: dict[str, Callable[[Unit, list[dict]], Generator[Progress, None, dict]]] = {
    "confidence": _confidence,
    "rewriter": rewriter,
    "prompted": prompted,
    "implicit": implicit,
    "file": _file,
}


def read_rewards(path: str) -> dict[tuple[str, str], list[float]]:
    """A user's rewards by prompt and response: JSON lines {prompt, response, rewards}. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"rewards.path: {path}: no such file")
    rewards = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if line.strip():
            row = _parse_rewards(line, f"{path}:{number}")
            rewards[str(row["prompt"]), row["response"]] = row["rewards"]
    return rewards


def _parse_rewards(line: bytes, where: str) -> dict:
    try:
        row = parse_json(line)
    except UnusableRow as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(row, dict) or not {"prompt", "response", "rewards"} <= row.keys():
        raise UserError(f"{where}: expected the fields prompt, response and rewards")
    if not isinstance(row["response"], str):
        raise UserError(f"{where}: response: expected a text, got {row['response']!r:.80}")
    rewards = row["rewards"]
    if not isinstance(rewards, list) or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in rewards):
        raise UserError(f"{where}: rewards: expected numbers in 0..1")
    return row
