"""What `check` sees of the rows of a data source, in one reading."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from allo_fast.data.encoding import prompt_digest
from allo_fast.data.problems import Quarantined
from allo_fast.stages.pairs import part_of
from allo_fast.stages.problems import distinct_responses

_REASONS = 5


@dataclass
class Seen:
    """longest, shortest: tokens of a prompt with a response. highest: token id. prompts: their digests.

    aside: how many rows for each kind of reason, and in `kinds` the first of them. parts: problems that have pairs, by
    `part_of`.
    """

    first: dict | None = None
    longest: int = 0
    shortest: int = 1 << 31
    highest: int = 0
    prompts: array = field(default_factory=lambda: array("Q"))
    aside: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Quarantined] = field(default_factory=dict)
    parts: Counter[tuple[bool, bool]] = field(default_factory=Counter)

    @property
    def reasons(self) -> list[str]:
        """Each kind of reason once, with the first row that has it and how many have; five, and of the others how
        many there are."""
        largest = self.aside.most_common(_REASONS)
        first = [(self.kinds[kind], count) for kind, count in largest]
        said = [f"{row.id}: {row.reason}" + f" ({count} rows)" * (count > 1) for row, count in first]
        others = self.aside.total() - sum(count for _, count in largest)
        return said + [f"and {others} rows for {len(self.aside) - len(largest)} other reasons"] * bool(others)


def look(outcomes: Iterable[dict | Quarantined], new_tokens: int, eval_size: float | None) -> Seen:
    """new_tokens: of a response that is still to be sampled."""
    seen = Seen()
    for row in outcomes:
        if isinstance(row, Quarantined):
            kind = re.sub(r"\[.*\]|'[^']*'|\"[^\"]*\"|\d+", "", row.reason)
            seen.aside[kind] += 1
            seen.kinds.setdefault(kind, row)
            continue
        responses = [response["ids"] for response in row["responses"]]
        seen.first = seen.first or row
        seen.prompts.append(prompt_digest(row))
        seen.shortest = min(seen.shortest, len(row["prompt_ids"]) + min(map(len, responses), default=1) - 1)
        seen.longest = max(seen.longest, len(row["prompt_ids"]) + max(map(len, responses), default=new_tokens))
        seen.highest = max(seen.highest, *row["prompt_ids"], *(token for ids in responses for token in ids))
        if distinct_responses(row, True) and distinct_responses(row, False):
            seen.parts[part_of(row, eval_size or 0.0)] += 1
    return seen
