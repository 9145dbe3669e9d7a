"""Generated reasoning tasks of the library reasoning-gym, by name and difficulty, as an endless source of problems.

reasoning_gym:chain_sum?max_terms=3&max_digits=1[:500]
"""

import json
from collections.abc import Callable, Iterator
from urllib.parse import parse_qsl

from allo_fast.errors import UserError, first_line

PREFIX = "reasoning_gym:"


def gym_rows(name: str, start: int, stop: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Problems start..stop of a task, each a row {problem, solution, answer, question, metadata}, and where it stands.

    name: reasoning_gym:TASK, or with settings of the task behind: ?KEY=VALUE&KEY=VALUE. Raises UserError for what the
    library does not know, or where it is not installed.
    """
    task, _, words = name.removeprefix(PREFIX).partition("?")
    settings = {key: _value(value) for key, value in parse_qsl(words, keep_blank_values=True)}
    try:
        import reasoning_gym

        tasks = reasoning_gym.create_dataset(task, **{"seed": 0, **settings, "size": stop})
    except ImportError:
        raise UserError(f"{name}: needs reasoning-gym: pip install reasoning-gym") from None
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{name}: {first_line(error)}") from None
    return ((f"{name}:{index}", lambda index=index: _row(tasks[index])) for index in range(start, stop))


def _value(text: str) -> object:
    """A number, true, a list; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _row(entry: dict) -> dict:
    return {"problem": entry["question"], "solution": f"The answer is {entry['answer']}", **entry}
