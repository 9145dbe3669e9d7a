"""Preference pairs: every correct response against every wrong one of the same problem, at most 5 at random.

    `allo-fast pairs CONFIG`

Departs from the release: file order decides nothing, a seed does. Writes pairs.jsonl {id, prompt, chosen, rejected,
and the token ids of all three; weights, where the data has them}, and eval_pairs.jsonl, those of the problems that
`pairs.eval_size` keeps from training: a problem's prompt decides, whatever the seed.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from itertools import product

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
    seen: set[int] = set()

    def pairs() -> Iterator[dict]:
        for row in problems:
            pairs = _pairs(row, unit, counts)
            for pair in pairs:
                _count_again(pair, seen, counts)
            if _is_held_out(row, share):
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

    write_jsonl(unit.folder / PAIRS, pairs())
    if counts["without_weight"] == counts["pairs"]:
        raise UserError("every pair has a loss_weight of 0, and nothing would be learned")
    if share:
        if not 0 < len(held_out) < counts["pairs"]:
            raise UserError(
                f"pairs.eval_size: {share} of {counts['problems']} problems with pairs leaves {len(held_out)} of "
                f"{counts['pairs']} pairs to look at; name another share"
            )
        write_jsonl(unit.folder / EVAL_PAIRS, held_out)
        counts.update(eval_pairs=len(held_out), pairs=-len(held_out))
    return counts


def _count_again(pair: dict, seen: set[int], counts: Counter[str]) -> None:
    """A pair that an earlier one is like, or is with its sides swapped; which trains all the same."""
    prompt, *sides = (tuple(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
    own, swapped = hash((prompt, *sides)), hash((prompt, *sides[::-1]))
    found = {"repeated": own in seen, "contradictory": swapped in seen, "without_weight": pair.get("loss_weight") == 0}
    counts.update(name for name, holds in found.items() if holds)
    seen.add(own)


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
