"""The rows of data.train and data.test; where no test is named, some of the prompts of data.train are held out for it.

Which ones a prompt's own digest decides: rows of one prompt stay together, and neither their order nor a seed matters.
"""

from collections.abc import Iterator
from typing import Literal

from allo_fast.config import UserError
from allo_fast.config_sections import DataConfig
from allo_fast.data.problems import Problem, Quarantined, digest_of_prompt, read_problems

Key = Literal["train", "test"]  # of `data`


def read_split(data: DataConfig, key: Key) -> Iterator[Problem | Quarantined]:
    """As `read_problems`; what is set aside of rows that are divided is of data.train. Raises UserError."""
    rows = read_problems(getattr(data, key), data.format, data.scorer)
    if data.test_size is None:
        return rows
    last = _last_held_out(data)
    return (row for row in rows if (isinstance(row, Problem) and digest_of_prompt(row) <= last) == (key == "test"))


def _last_held_out(data: DataConfig) -> bytes:
    """The prompts with the lowest digests are held out, at least one of them, up to this one."""
    rows = read_problems(data.train, data.format, data.scorer)
    digests = sorted({digest_of_prompt(row) for row in rows if isinstance(row, Problem)})
    if len(digests) < 2:
        raise UserError(f"{data.train}: one prompt alone, of which none can be held out; name a data.test")
    count = max(1, min(len(digests) - 1, round(data.test_size * len(digests))))
    return digests[count - 1]
