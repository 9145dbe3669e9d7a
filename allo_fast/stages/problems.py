"""The problems of a data source as a run trains and answers them: rendered once, kept with the unit."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from allo_fast.config import Config, UserError
from allo_fast.data.encoding import Limits, encode_problems, max_positions
from allo_fast.data.problems import Problem, Quarantined
from allo_fast.data.prompts import Prompts
from allo_fast.data.splitting import Key, read_split
from allo_fast.plan.shapes import model_config
from allo_fast.runs.rows import Rows, split_once
from allo_fast.runs.unit import Unit

PROBLEMS, QUARANTINE = "problems.jsonl", "quarantine.jsonl"


def unit_problems(unit: Unit, key: Key, prompts: Prompts, new_tokens: int, *paths: str | Path) -> tuple[Rows, int]:
    """Rows of `encode_problems`, and how many were set aside; problems.jsonl and quarantine.jsonl of the unit.

    paths: the models that read them; none: the base. A continued unit reads what it rendered, so that a chat template
    with today's date changes nothing. Raises UserError where no row is usable.
    """

    def render() -> Iterator[tuple[dict, str]]:
        aside, usable = None, False
        for outcome in usable_problems(unit.config, key, prompts, new_tokens, *paths):
            if isinstance(outcome, Quarantined):
                aside = aside or outcome
                yield vars(outcome), QUARANTINE
            else:
                usable = True
                yield outcome, PROBLEMS
        if not usable:
            source = getattr(unit.config.data, key)
            raise UserError(f"data.{key}: {source}: no usable row; {aside.id}: {aside.reason}")

    rows, quarantined = split_once(unit, (PROBLEMS, QUARANTINE), render)
    return rows, len(quarantined)


def usable_problems(
    config: Config, key: Key, prompts: Prompts, new_tokens: int, *paths: str | Path
) -> Iterator[dict | Quarantined]:
    """Of each row of a data source what it is when it is encoded, or why it is set aside; one by one."""
    return encode_problems(problems_of(config, key), prompts, limits(config, new_tokens, *paths))


def problems_of(config: Config, key: Key) -> Iterator[Problem | Quarantined]:
    """Those of data.train without a solution are set aside, where a stage trains on it or shows it."""
    data, gold = config.data, key == "train" and config.reads_solutions
    try:
        for row in read_split(data, key):
            lacking = gold and isinstance(row, Problem) and not (row.solution or row.right)
            yield Quarantined(row.id, "no solution, which sft and rewards.source need") if lacking else row
    except UserError as error:
        raise UserError(f"data.{key}: {error}") from None


def first_row(
    rows: Sequence[dict], prompts: Prompts, responses: Callable[[dict], list[dict]] = lambda row: row["responses"]
) -> dict[str, str]:
    """The first prompt and, once there is one, its response as they are trained, with their special tokens.

    responses: of a row those that are trained.
    """
    row = next(filter(responses, rows), rows[0])
    parts = [("prompt", row["prompt_ids"]), *(("response", response["ids"]) for response in responses(row)[:1])]
    return {name: prompts.tokenizer.decode(ids) for name, ids in parts}


def right_responses(row: dict) -> list[dict]:
    """{text, ids} of the right responses of a row of `encode_problems`; of one without responses its gold solution."""
    return (
        distinct_responses(row, True) if row["responses"] else [{"text": row["solution"], "ids": row["solution_ids"]}]
    )


def distinct_responses(row: dict, correct: bool) -> list[dict]:
    """Those of a row that are right, or wrong, each once, by its tokens."""
    by_tokens: dict[tuple[int, ...], dict] = {}
    for response in row["responses"]:
        if response["correct"] == correct and response["text"].strip():
            by_tokens.setdefault(tuple(response["ids"]), response)
    return list(by_tokens.values())


def limits(config: Config, new_tokens: int, *paths: str | Path) -> Limits:
    """Of the configuration and of all models at `paths`, or of the base; infinite where the models name none."""
    models = [model_config(config, str(path)).get_text_config() for path in paths]
    models = models or [model_config(config).get_text_config()]
    positions, vocabulary = min(map(max_positions, models)), min(model.vocab_size for model in models)
    return Limits(config.data.max_prompt_tokens, config.data.max_response_tokens, new_tokens, positions, vocabulary)
