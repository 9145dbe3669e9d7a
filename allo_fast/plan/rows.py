"""How many rows a job has, where they can be counted without fetching anything; else a thousand."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from allo_fast.config import SAMPLED, Config, TrainConfig, UserError
from allo_fast.data.problems import Problem
from allo_fast.data.sources import is_generated, split_slice
from allo_fast.data.splitting import Key, read_split

_THOUSAND = 1000
_OPTIONS = {"multiple_choice": 5, "preference": 2}  # responses of a row that cannot be read


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
    return _rows(config, *(_count(key, config) for key in ("train", "test")))


def unknown_rows(config: Config) -> Rows:
    """Where only memory matters."""
    return _rows(config, None, None)


def _rows(config: Config, train: Counter[str] | None, test: Counter[str] | None) -> Rows:
    known = train or _unknown(config)
    return Rows(
        problems=known["problems"],
        right=known["right"],
        pairs=known["pairs"],
        wrong=known["wrong"],
        tests=test["problems"] if test else _THOUSAND,
        options=max(known["options"], (test or {}).get("options", 0)) or _OPTIONS.get(config.data.format, 0),
        train_known=train is not None,
        test_known=test is not None,
    )


def _count(key: Key, config: Config) -> Counter[str] | None:
    """None where it lies elsewhere, or `allo-fast check` has something to say of it."""
    name = os.path.expanduser(split_slice(getattr(config.data, key))[0])
    if not (is_generated(name) or Path(name).is_file() or Path(name.partition(":")[0]).is_dir()):
        return None
    counts = Counter(options=0)
    try:
        for row in read_split(config.data, key):
            if isinstance(row, Problem):
                pairs, wrong = _pairs(config, row)
                counts.update(problems=1, right=max(1, len(row.right)), pairs=pairs, wrong=wrong)
                counts["options"] = max(counts["options"], len(row.right) + len(row.wrong))
    except UserError:
        return None
    return counts


def _unknown(config: Config) -> Counter[str]:
    pairs, wrong = _pairs(config, None)
    thousand = {"problems": 1, "right": 1, "pairs": pairs, "wrong": wrong}
    return Counter({name: _THOUSAND * count for name, count in thousand.items()})


def _pairs(config: Config, row: Problem | None) -> tuple[int, int]:
    """Pairs of a problem, and the different rejected responses in them. None: of one that cannot be read."""
    most, sampled = config.pairs.max_pairs, config.sample.num_return_sequences
    if row and config.data.format not in SAMPLED:
        return min(most, len(row.right) * len(row.wrong)), min(most, len(row.wrong))
    if given := _OPTIONS.get(config.data.format):  # of which one is right
        return min(most, given - 1), min(most, given - 1)
    return min(most, sampled * sampled // 4), min(most, sampled - 1)


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


def micro_batches(config: Config, section: str, train: TrainConfig) -> int:
    """Of a step, of all ranks together, where every example is as long as may be."""
    if train.max_tokens_per_batch is None:
        return train.gradient_accumulation_steps
    together = max(1, train.max_tokens_per_batch // sum(example_tokens(config, section)))
    return math.ceil(train.examples_per_step / together)


def sized_by(section: str, train: TrainConfig) -> str:
    """The key that says how much is in a micro-batch."""
    return f"{section}.{'max_tokens_per_batch' if train.max_tokens_per_batch else 'per_device_train_batch_size'}"


def micro_batch_tokens(config: Config, section: str, train: TrainConfig) -> int:
    """Of a micro-batch, at most; without a budget with the padding of a model whose rows are not packed, where examples
    of one problem share its prompt and make a longer row."""
    if train.max_tokens_per_batch:
        return train.max_tokens_per_batch
    size = train.per_device_train_batch_size
    prompt, responses = example_tokens(config, section)
    most = 1 if section in ("pretrain", "sft", "rewards.train") else config.pairs.max_pairs  # of one prompt
    return max(rows * (prompt + responses * min(most, size - rows + 1)) for rows in range(1, size + 1))
