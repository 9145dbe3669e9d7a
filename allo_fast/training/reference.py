"""Log-probabilities of responses by a reference model: computed once, kept by content, read by whoever needs them.

A file has those of many responses: `digests` [n, 16], of the tokens of each with its prompt, `ends` [n] and `values`,
all one behind another; and says for which responses' sake they were computed. What those still lack is computed in the
forward passes that would have had it, had nothing interrupted them, so that not a bit depends on it.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.data.arrays import Lazy
from allo_fast.data.batch import Batch, Layout, collate, rows_of
from allo_fast.data.corpus import Corpus
from allo_fast.durable import (
    LEFTOVERS,
    about_of,
    locked,
    make_folder,
    mark_of,
    open_tensors,
    own,
    reason,
    save_tensors,
    versions,
)
from allo_fast.model.weights import as_bytes
from allo_fast.training.steps import Rows, cut

logger = logging.getLogger(__name__)

PARTS = "reference-*.safetensors"
_PART_NUMBERS = 1 << 22  # that a file has at most, if a response has fewer
_SECONDS = 600.0  # after which a file is written, however few it has
_WINDOW = 512  # responses that are divided into passes at once, so that memory does not grow with the corpus
TOKENS = 4096  # of a forward pass without gradients, where nothing else is said


def kept(cache: Path, of: str) -> tuple[Path, str]:
    """The folder in `cache`, and the mark, of a reference model that is known by these words."""
    mark = hashlib.sha256(of.encode()).hexdigest()
    return cache / f"reference-{mark[:16]}", mark


def described(model: PreTrainedModel, weights: str, layout: Layout, autocast: torch.dtype | None = None) -> str:
    """What decides the log-probabilities that a model gives, beside the tokens. weights: its fingerprint."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones under every name
    saved = {name: as_bytes(value) for name, value in model.state_dict().items() if name not in parameters}
    digest = hashlib.sha256(repr(sorted(settings.items(), key=str)).encode())
    for name, value in sorted(saved.items()):
        digest.update(name.encode())
        digest.update(value)
    attention = model.config.get_text_config()._attn_implementation
    decided = (digest.hexdigest(), autocast, attention, layout, model.device.type, versions())
    return " ".join(map(str, (weights, *decided)))


class Opened(NamedTuple):
    """A reference model while it is there."""

    compute: Callable[[Batch], Tensor]
    layout: Layout
    device: torch.device


class Reference(Lazy[list[float]]):
    """Per response of `corpus`, fp32, as found in `folder`. mark: of what the files there are."""

    def __init__(self, folder: Path, mark: str, corpus: Corpus, responses: np.ndarray):
        self.folder, self.mark, self.corpus = folder, mark, corpus
        self.responses = responses  # those that are asked for
        self._digests = np.array([_digest(corpus, number) for number in responses.tolist()], dtype="S16")
        self._asked = hashlib.sha256(self._digests.tobytes()).hexdigest()
        self._count = len(corpus.responses)
        self._whole: list[Path] = []
        self._parts: list[tuple[Tensor, np.ndarray]] = []
        self._for_these: list[bool] = []  # of each part, whether it was computed for the responses that are asked for
        self._places = np.full((self._count, 2), -1, dtype=np.int64)  # part, number in it

    def __len__(self) -> int:
        return self._count

    def item(self, index: int) -> list[float]:
        part, place = self._places[index].tolist()
        assert part >= 0, "only responses that were asked for"
        values, ends = self._parts[part]
        return values[ends[place - 1] if place else 0 : ends[place]].tolist()

    def read(self) -> None:
        """Finds what the files have."""
        self._parts.clear()
        self._for_these.clear()
        self._places[:] = -1
        self._whole = ranks.on_main(self._look)
        order = np.argsort(self._digests, kind="stable")
        ordered = self._digests[order]
        for number, path in enumerate(self._whole):
            file = open_tensors(path, check=False)
            digests = file.get_tensor("digests").numpy().view("S16")[:, 0]
            self._parts.append((file.get_tensor("values"), file.get_tensor("ends").numpy()))
            self._for_these.append(about_of(file).get("asked") == self._asked)
            first, last = np.searchsorted(ordered, digests), np.searchsorted(ordered, digests, "right")
            for place in np.flatnonzero(first < last).tolist():
                self._places[self.responses[order[first[place] : last[place]]]] = number, place

    def missing(self) -> tuple[np.ndarray, set[int]]:
        """Of the responses that are asked for, those that no file had when they first were, and that none has now.

        Of the same tokens the first.
        """
        parts = self._places[self.responses, 0]
        numbers = np.flatnonzero(np.array([*self._for_these, True])[parts])  # the last one's part is -1
        _, first = np.unique(self._digests[numbers], return_index=True)
        numbers = numbers[np.sort(first)]
        return self.responses[numbers], set(self.responses[numbers[parts[numbers] < 0]].tolist())

    def save(self, computed: list["_Computed"]) -> None:
        """Into a file of its own; rank 0 calls."""
        try:
            make_folder(self.folder)
        except OSError as error:  # of which the other ranks would not hear
            raise UserError(f"{self.folder}: cannot be written: {reason(error)}; it may be deleted") from None
        names = (self.folder / PARTS.replace("*", f"{number:05d}") for number in count())
        path = next(path for path in names if path not in self._whole and not path.is_dir())
        responses = np.concatenate([part.responses for part in computed])
        digests = self._digests[np.searchsorted(self.responses, responses)]
        lengths = torch.from_numpy(self.corpus.responses.tokens.lengths[responses])
        tensors = {"digests": torch.from_numpy(digests.view(np.uint8).reshape(-1, 16))}
        tensors |= {"ends": lengths.cumsum(0), "values": torch.cat([part.values for part in computed])}
        save_tensors(path, tensors, {"mark": own(path, self.mark), "asked": self._asked})
        self._whole.append(path)

    def _look(self) -> list[Path]:
        """Whole files; what is damaged, or of another model, is said and computed again."""
        for left in self.folder.glob(LEFTOVERS):  # where a kill interrupted writing
            shutil.rmtree(left, ignore_errors=True)
        marks = {path: mark for path in sorted(self.folder.glob(PARTS)) if (mark := mark_of(path)) is not None}
        for path in (others := [path for path, mark in marks.items() if mark != own(path, self.mark)]):
            logger.warning("%s: of another model or another way of computing; computed again", path)
        return [path for path in marks if path not in others]


def reference_logps(
    folder: Path,
    mark: str,
    corpus: Corpus,
    responses: np.ndarray,
    opened: AbstractContextManager[Opened],
    budget: int | None = None,
) -> Generator[tuple[int, int], None, Reference]:
    """Yields (responses done, all).

    What `folder` has already, from an earlier session or another stage, is not computed again. opened: the reference
    model, while entered. budget: tokens of a forward pass. mark: of the model and of how it computes.
    """
    ranks.agree({"reference model, or way to compute it": mark})
    with ExitStack() as stack:  # two commands that share a cache compute what both lack once
        ranks.on_main(lambda: stack.enter_context(locked(folder.with_name(f".{folder.name}.lock"))) or None)
        return (yield from _reference_logps(Reference(folder, mark, corpus, responses), opened, budget))


def _reference_logps(
    reference: Reference, opened: AbstractContextManager[Opened], budget: int | None
) -> Generator[tuple[int, int], None, Reference]:
    folder, corpus, responses = reference.folder, reference.corpus, reference.responses
    reference.read()
    planned, missing = reference.missing()
    if not missing:
        yield len(responses), len(responses)
        return reference
    done = len(responses) - len(missing)
    with opened as model:
        waiting: list[_Computed] = []
        due_at = time.monotonic() + _SECONDS
        for computed in _computed(corpus, planned, missing, model, budget or TOKENS):
            waiting.append(computed)
            done += len(computed.responses)
            size = sum(len(part.values) for part in waiting)
            if size > _PART_NUMBERS or ranks.on_main(partial(_is_past, due_at)):
                ranks.on_main(lambda: reference.save(waiting))
                waiting.clear()
                due_at = time.monotonic() + _SECONDS
            yield done, len(responses)
        if waiting:
            ranks.on_main(lambda: reference.save(waiting))
    reference.read()
    if reference.missing()[1]:
        raise UserError(f"{folder}: files were removed while they were needed; the same command computes them again")
    return reference


def _is_past(moment: float) -> bool:
    return time.monotonic() > moment


class _Computed(NamedTuple):
    responses: np.ndarray
    values: Tensor  # fp32, of all their tokens


def _computed(
    corpus: Corpus, planned: np.ndarray, missing: set[int], model: Opened, budget: int
) -> Iterator[_Computed]:
    """Some responses after others, each micro-batch by one of the ranks, on all of them."""
    ranks.agree({"layout of its reference": str(model.layout)})
    micros, rank = micro_batches(corpus, planned, model.layout, budget, missing), ranks.rank()
    while several := list(islice(micros, ranks.world_size())):
        # Where fewer are left than there are ranks, some compute the first too: a sharded model needs them all.
        micro = several[rank if rank < len(several) else 0]
        batch = collate(corpus, [(number,) for number in micro], model.layout)
        with torch.no_grad():
            logps = model.compute(batch.to(model.device)).float().cpu()
        yield from ranks.gather(_Computed(np.array(micro), logps[batch.valid]))[: len(several)]


def micro_batches(
    corpus: Corpus, responses: np.ndarray, layout: Layout, budget: int = TOKENS, lacking: set[int] | None = None
) -> Iterator[Sequence[int]]:
    """Some responses, those of one prompt together, in forward passes of `budget` tokens if none has more by itself.

    lacking: only the passes that have one of these.
    """
    prompts = corpus.responses.prompts
    responses = responses[np.argsort(prompts[responses], kind="stable")]

    def rows(numbers: Sequence[int]) -> Rows:
        return rows_of(corpus, np.asarray(numbers), layout)

    for begin in range(0, len(responses), _WINDOW):
        window = responses[begin : begin + _WINDOW].tolist()
        if lacking is None or not lacking.isdisjoint(window):
            micros = cut(window, lambda number: int(prompts[number]), rows, budget)
            yield from (micro for micro in micros if lacking is None or not lacking.isdisjoint(micro))


def _digest(corpus: Corpus, response: int) -> bytes:
    prompt, tokens = corpus.prompts[int(corpus.responses.prompts[response])], corpus.responses.tokens[response]
    digest = hashlib.blake2b(digest_size=16)
    for numbers in ([len(prompt)], prompt, tokens):
        digest.update(np.array(numbers, dtype=np.int32))
    return digest.digest()
