"""Generated reasoning tasks of the library reasoning-gym, by name and difficulty, as an endless source of problems.

reasoning_gym:chain_sum?max_terms=3&max_digits=1[:500]
"""

import difflib
import json
from collections.abc import Callable, Iterator

from allo_fast.errors import UserError, first_line

PREFIX = "reasoning_gym:"


def gym_rows(name: str, start: int, stop: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Problems start..stop of a task, each a row {problem, solution, answer, question, metadata}, and where it stands.

    name: reasoning_gym:TASK, or with settings of the task behind: ?KEY=VALUE&KEY=VALUE. Raises UserError for what the
    library does not know, or where it is not installed.
    """
    task, _, words = name.removeprefix(PREFIX).partition("?")
    pairs = [word.partition("=") for word in words.split("&") if word]
    settings = {key: _value(value) for key, _, value in pairs}
    if "seed" in settings:
        raise UserError(f"{name}: seed: problem i of seed 1 is i + 1 of seed 0; other slices are other problems")
    try:
        import reasoning_gym

        tasks = reasoning_gym.create_dataset(task, **settings, seed=0, size=stop)
    except ImportError:
        raise UserError(f"{name}: needs reasoning-gym: pip install reasoning-gym") from None
    except ValueError as error:
        near = difflib.get_close_matches(task, reasoning_gym.factory.DATASETS, n=1)
        raise UserError(f"{name}: {first_line(error)}{f'; did you mean {near[0]}?' if near else ''}") from None
    except (TypeError, AssertionError) as error:
        raise UserError(f"{name}: {first_line(error)}") from None
    return ((f"{name}:{index}", lambda index=index: _row(tasks[index])) for index in range(start, stop))


def _value(text: str) -> object:
    """A number, true, a list; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _row(entry: dict) -> dict:
    """Without a solution where only a judge knows what is right."""
    solution = {} if entry["answer"] is None else {"solution": f"The answer is {entry['answer']}"}
    return {"problem": entry["question"], **solution, **entry}
