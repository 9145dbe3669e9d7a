"""How many rows a job has, where they can be counted without fetching anything; else a thousand."""

from dataclasses import dataclass
from pathlib import Path

from allo_fast.config import Config, UserError
from allo_fast.data.problems import Problem, read_problems
from allo_fast.data.sources import split_slice

_THOUSAND = 1000
_OPTIONS = {"multiple_choice": 5, "preference": 2}  # responses of a row that cannot be read
SAMPLED = ("problems", "gsm8k")  # the formats whose responses are sampled and answers generated


@dataclass(frozen=True)
class Rows:
    """At most. options: given responses of a row. train_known, test_known: counted, not a thousand instead."""

    problems: int
    right: int  # gold solutions, or given responses that are right
    pairs: int
    wrong: int  # different rejected responses
    tests: int
    options: int = 0
    train_known: bool = False
    test_known: bool = False


def count_rows(config: Config) -> Rows:
    """Of local files, saved data sets and generated arithmetic; a thousand rows of what lies elsewhere."""
    return _rows(config, *(_read(source, config.data.format) for source in (config.data.train, config.data.test)))


def unknown_rows(config: Config) -> Rows:
    """Where only memory matters."""
    return _rows(config, None, None)


def _rows(config: Config, train: list[Problem] | None, test: list[Problem] | None) -> Rows:
    options = max((len(row.right) + len(row.wrong) for row in [*(train or []), *(test or [])]), default=0)
    pairs, wrong = _pairs(config, train)
    return Rows(
        problems=len(train) if train else _THOUSAND,
        right=sum(max(1, len(row.right)) for row in train) if train else _THOUSAND,
        pairs=pairs,
        wrong=wrong,
        tests=len(test) if test else _THOUSAND,
        options=options or _OPTIONS.get(config.data.format, 0),
        train_known=train is not None,
        test_known=test is not None,
    )


def _read(source: str, format: str) -> list[Problem] | None:
    """None where it lies elsewhere, or `allo-fast check` has something to say of it."""
    name = split_slice(source)[0]
    if not (name.startswith("arithmetic:") or Path(name).is_file() or Path(name.partition(":")[0]).is_dir()):
        return None
    try:
        return read_problems(source, format)[0]
    except UserError:
        return None


def _pairs(config: Config, rows: list[Problem] | None) -> tuple[int, int]:
    """Pairs, and the different rejected responses in them."""
    most = config.pairs.max_pairs
    if rows and config.data.format not in SAMPLED:
        pairs = sum(min(most, len(row.right) * len(row.wrong)) for row in rows)
        return pairs, sum(min(most, len(row.wrong)) for row in rows)
    count = len(rows) if rows else _THOUSAND
    if given := _OPTIONS.get(config.data.format):  # of which one is right
        return count * min(most, given - 1), count * min(most, given - 1)
    sampled = config.sample.num_return_sequences
    return count * min(most, sampled * sampled // 4), count * min(most, sampled - 1)


def examples(config: Config, rows: Rows, section: str) -> int:
    """Of an epoch of what a section trains on, at most."""
    if section == "rewards.train":
        return min(rows.wrong, config.rewards.max_examples or rows.wrong)
    if section == "sft":
        return min(rows.right, config.sft.max_examples or rows.right)
    if section == "pretrain":
        return config.pretrain.problems
    return rows.wrong if section == "forget" else rows.pairs


def response_tokens(config: Config) -> int:
    """Of a response, at most."""
    given = config.data.max_response_tokens
    return max(given, config.sample.max_new_tokens) if config.data.format in SAMPLED else given


def example_tokens(config: Config, section: str) -> tuple[int, int]:
    """Of an example's prompt, and of its responses, at most."""
    prompt, response = config.data.max_prompt_tokens, response_tokens(config)
    if section == "rewards.train":
        return prompt + 2 * response, response  # the prompt shows the solution and the wrong response
    return prompt, response * (1 if section in ("forget", "pretrain", "sft") else 2)


def micro_batch_tokens(config: Config, section: str, size: int) -> int:
    """Of a micro-batch, at most, padding included: examples of one problem share its prompt and make a longer row."""
    prompt, responses = example_tokens(config, section)
    most = 1 if section in ("pretrain", "sft", "rewards.train") else config.pairs.max_pairs  # of one prompt
    return max(rows * (prompt + responses * min(most, size - rows + 1)) for rows in range(1, size + 1))
