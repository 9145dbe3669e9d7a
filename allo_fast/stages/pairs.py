"""Preference pairs: every correct response against every wrong one of the same problem, at most 5 at random.

    `allo-fast pairs CONFIG`

Departs from the release: file order decides nothing, a seed does. Writes pairs.jsonl {id, prompt, chosen, rejected,
and the token ids of all three; weights, where the data has them}, and eval_pairs.jsonl, those of the problems that
`pairs.eval_size` keeps from training: a problem's prompt decides, whatever the seed.
"""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from itertools import product

import numpy as np

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.runs.rows import read_jsonl, write_jsonl
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.problems import distinct_responses

PAIRS, EVAL_PAIRS = "pairs.jsonl", "eval_pairs.jsonl"


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    problems = read_jsonl(unit.needed("sample") / "responses.jsonl")
    counts = ranks.on_main(lambda: _write(unit, problems))
    yield Progress(len(problems), len(problems), "problem")
    return dict(counts)


def _write(unit: Unit, problems: Sequence[dict]) -> Counter[str]:
    counts = Counter(pairs=0, problems=0, no_correct=0, no_wrong=0)
    share = unit.config.pairs.eval_size or 0.0
    held_out: list[dict] = []
    digests = array("q"), array("q")  # of the pairs, and of them with their sides swapped
    parts: Counter[tuple[bool, bool]] = Counter()

    def pairs() -> Iterator[dict]:
        for row in problems:
            pairs = _pairs(row, unit, counts)
            for pair in pairs:
                prompt, *sides = (tuple(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
                digests[0].append(hash((prompt, *sides)))
                digests[1].append(hash((prompt, *sides[::-1])))
            part = part_of(row, share)
            parts.update([part] * bool(pairs))
            if part[0]:
                held_out.extend(pairs)
            else:
                yield from pairs
        if not counts["pairs"]:
            gold = ", or set pairs.gold: missing" * any("solution_ids" in row for row in problems)
            alike = counts["alike"] and f" (in {counts['alike']} all have one score)" or ""
            raise UserError(
                f"no pair left: of {len(problems)} problems {counts['no_correct']} have no correct response and "
                f"{counts['no_wrong']} no wrong one{alike}; sample more{gold}"
            )
        check_parts(parts, share)
        counts.update(_said_again(*digests))

    write_jsonl(unit.folder / PAIRS, pairs())
    if share:
        write_jsonl(unit.folder / EVAL_PAIRS, held_out)
        counts.update(eval_pairs=len(held_out), pairs=-len(held_out))
    return counts


def part_of(row: dict, share: float) -> tuple[bool, bool]:
    """Of a problem with pairs: whether `pairs.eval_size` keeps them from training, and whether they weigh anything."""
    return _is_held_out(row, share), row.get("loss_weight", 1.0) > 0


def check_parts(parts: Counter[tuple[bool, bool]], share: float) -> None:
    """Raises UserError where nothing is left to train, or to look at. parts: how many problems each has."""
    held_out = parts[True, True] + parts[True, False]
    if share and not 0 < held_out < parts.total():
        raise UserError(
            f"pairs.eval_size: {share} of {parts.total()} problems with pairs leaves {held_out} to look at; "
            "name another share"
        )
    for is_held_out, said in ((False, "train"), (True, "pairs.eval_size holds out")):
        if parts[is_held_out, False] and not parts[is_held_out, True]:
            raise UserError(f"loss_weight: those of all pairs that {said} are 0")


def _said_again(own: array, swapped: array) -> dict[str, int]:
    """How many pairs repeat another, and how many another contradicts, where there are any; they train all the same."""
    found = {"repeated": len(own) - len(np.unique(own)), "contradictory": int(np.isin(own, swapped).sum())}
    return {name: count for name, count in found.items() if count}


def _is_held_out(row: dict, share: float) -> bool:
    """By the prompt's tokens, and not as data.test_size decides, which has taken its share."""
    digest = hashlib.sha256(f"eval {row['prompt_ids']}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def _pairs(row: dict, unit: Unit, counts: Counter[str]) -> list[dict]:
    """Of one problem, which is counted."""
    settings = unit.config.pairs
    correct, wrong = distinct_responses(row, True), distinct_responses(row, False)
    counts.update(no_correct=not correct, no_wrong=not wrong, alike=bool(row["responses"]) and not (correct or wrong))
    if not correct and settings.gold == "missing" and "solution_ids" in row:
        correct = [{"text": row["solution"], "ids": row["solution_ids"]}]
    both = [(chosen, rejected) for chosen, rejected in product(correct, wrong) if chosen["ids"] != rejected["ids"]]
    drawn = random.Random(f"{unit.seed} {row['id']}").sample(both, min(settings.max_pairs, len(both)))
    counts.update(pairs=len(drawn), problems=bool(drawn))
    return [_pair(row, chosen, rejected) for chosen, rejected in drawn]


def _pair(row: dict, chosen: dict, rejected: dict) -> dict:
    texts = {"chosen": chosen["text"], "rejected": rejected["text"]}
    ids = {"prompt_ids": row["prompt_ids"], "chosen_ids": chosen["ids"], "rejected_ids": rejected["ids"]}
    sides = {"chosen": chosen, "rejected": rejected}
    weights = {f"{side}_weights": response["weights"] for side, response in sides.items() if "weights" in response}
    weights |= {"loss_weight": row["loss_weight"]} if "loss_weight" in row else {}
    return {"id": row["id"], "prompt": row["prompt"], **texts, **ids, **weights}
