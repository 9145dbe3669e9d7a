"""A judge of the user's own: `data.scorer: FILE.py:FUNCTION`, with FUNCTION(response: str, row: dict) -> bool, or a
number from 0, wrong, to 1, right.

The row is that of the data, with all its fields. Rows need neither solution nor answer, where nothing trains on them.
Whether a run still fits is asked of this one file; what it imports may change unseen.
"""

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from numbers import Real
from pathlib import Path

import numpy as np

from allo_fast.config import Config
from allo_fast.config_sections import OWN_SCORER, REWARD_MODEL
from allo_fast.errors import UserError, first_line, no_such

Judge = Callable[[str, dict], float]  # of a response and the row that it answers: from 0, wrong, to 1, right


def is_own(scorer: str) -> bool:
    return re.fullmatch(OWN_SCORER, scorer) is not None and not scorer.startswith(REWARD_MODEL)


def reward_model_of(scorer: str) -> str | None:
    """The folder or hub id of the reward model, where one judges."""
    path = scorer.removeprefix(REWARD_MODEL)
    return os.path.expanduser(path) if path != scorer else None


def judging_model(config: Config) -> str | None:
    """The reward model that judges a job's answers, if one does."""
    return reward_model_of(config.data.scorer) if config.generates_answers else None


def file_of(scorer: str) -> Path:
    return Path(scorer.rpartition(":")[0]).expanduser()


@cache
def own_judge(scorer: str) -> Judge:
    """Raises UserError where the file cannot be run or has no such function; the judge, for what it does not judge."""
    path, name = file_of(scorer), scorer.rpartition(":")[2]
    if not path.is_file():
        raise UserError(f"data.scorer: {no_such(path)}")
    spec = importlib.util.spec_from_file_location(f"scorer_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"data.scorer: {path}: {type(error).__name__}: {first_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"data.scorer: {path}: no function {name}")

    def judge(response: str, row: dict) -> float:
        try:
            right = function(response, deepcopy(row))
            known = isinstance(right, Real | np.bool_) and 0 <= right <= 1
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
            where = f", {path}:{lines[-1]}" if lines else ""  # none, where it takes other arguments
            why = f"{type(error).__name__}: {first_line(error)}{where}"
            raise UserError(f"data.scorer: {name}: {why}, of the response {response!r:.200}") from error
        if not known:
            said = f"expected True, False or a number between 0 and 1, got {right!r:.200}"
            raise UserError(f"data.scorer: {name}: {said}, of the response {response!r:.200}")
        return bool(right) if right in (0, 1) else float(right)

    return judge
