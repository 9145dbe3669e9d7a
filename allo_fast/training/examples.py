"""What a stage trains on, step by step."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

from allo_fast import ranks
from allo_fast.config import TrainConfig, UserError
from allo_fast.data.arrays import Chained, Ragged
from allo_fast.data.batch import Batch, Layout, collate, rows_of
from allo_fast.data.corpus import Corpus
from allo_fast.training.steps import MicroBatch, Rows, cut, plan_steps, shuffled

logger = logging.getLogger(__name__)


class Examples:
    """A corpus cut into optimizer steps and micro-batches, the same on every rank; without a budget for any number.

    Examples are known by their numbers, in the order of the first epoch. token_weights: per response, one number per
    token. reference: per response the log-probabilities by a reference model, once somebody sets them. Examples longer
    than max_tokens_per_batch are set aside, which is said. Raises UserError where that is all of them, and where a rank
    has another corpus.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: TrainConfig,
        seed: int = 0,
        token_weights: Ragged | list[list[float]] | None = None,
    ):
        self.token_weights, self.reference = token_weights, None
        self.budget, self.size = config.max_tokens_per_batch, config.per_device_train_batch_size
        weights = token_weights.arrays() if isinstance(token_weights, Ragged) else [token_weights]
        ranks.agree_on("corpus", chain(corpus.arrays(), weights))
        self._prompt_lengths, self._lengths = corpus.prompts.lengths, corpus.responses.tokens.lengths
        self._prompts = corpus.responses.prompts
        self.corpus, self.set_aside = self._fitting(corpus, config.section)
        self._layout = Layout(packed=True)
        self.rows = shuffled(self.corpus, seed)
        problems = self._prompts[self.rows[:, 0]]
        self.epochs = plan_steps(problems, config.examples_per_step, config.num_train_epochs, seed)
        self.steps = Chained(self.epochs)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def layout(self) -> Layout:
        """Of the model, for whoever knows it to set, on all ranks together: they share what it cuts."""
        return self._layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        ranks.agree({"layout of rows": str(layout)})
        self._layout = layout

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Those of all ranks."""
        examples = self.steps[step]
        if self.budget is None:
            return [tuple(examples[first : first + self.size]) for first in range(0, len(examples), self.size)]
        return cut(examples, self._problem, self._rows, self.budget, ranks.world_size())

    def share(self, step: int) -> list[tuple[MicroBatch, float]]:
        """This rank's micro-batches of a step, with weight 1; as many on every rank, some perhaps with weight 0."""
        micros, world, rank = self.micro_batches(step), ranks.world_size(), ranks.rank()
        local_micro_batches = [(micro, 1.0) for micro in micros[rank::world]]
        return local_micro_batches + [(micros[0], 0.0)] * (-(-len(micros) // world) - len(local_micro_batches))

    def responses(self, micro: Sequence[int]) -> np.ndarray:
        """Their numbers in the corpus, each once."""
        return np.unique(self.rows[list(micro)])

    def tokens(self, micro: Sequence[int]) -> int:
        """That a model computes on where prompts are shared."""
        return rows_of(self.corpus, self.responses(micro), Layout(packed=True))[0]

    def count(self, micro: MicroBatch, what: str) -> int:
        """How many "examples", "tokens" of their responses, or "weights" of tokens that are not 0."""
        if what == "examples":
            return len(micro)
        if what == "tokens":
            return int(self._lengths[self.responses(micro)].sum())
        return sum(int(np.count_nonzero(self.token_weights[response])) for response in self.responses(micro).tolist())

    def collate(self, micro: MicroBatch) -> Batch:
        """On the CPU."""
        examples = [tuple(row) for row in self.rows[list(micro)].tolist()]
        return collate(self.corpus, examples, self.layout, token_weights=self.token_weights, reference=self.reference)

    def batches(self, first: int) -> Iterator[list[tuple[MicroBatch, float, Batch]]]:
        """Of each step from `first` on this rank's share, collated by a thread while the step before it computes."""

        def made(step: int) -> list[tuple[MicroBatch, float, Batch]]:
            return [(micro, weight, self.collate(micro)) for micro, weight in self.share(step)]

        with ThreadPoolExecutor(1) as worker:
            coming = worker.submit(made, first) if first < len(self.steps) else None
            for step in range(first, len(self.steps)):
                found = coming.result()
                coming = worker.submit(made, step + 1) if step + 1 < len(self.steps) else None
                yield found

    def names_of(self, micro: MicroBatch) -> list[str]:
        """Of the rows that a micro-batch came from."""
        return self.corpus.names_of(self.rows[list(micro)].tolist())

    def _problem(self, example: int) -> int:
        return int(self._prompts[self.rows[example, 0]])

    def _rows(self, micro: Sequence[int]) -> Rows:
        return rows_of(self.corpus, self.responses(micro), self.layout)

    def _fitting(self, corpus: Corpus, section: str) -> tuple[Corpus, int]:
        """The examples that fit a micro-batch each, and how many do not. section: whose key that is."""
        if self.budget is None:
            return corpus, 0
        examples = np.asarray(corpus.examples, dtype=np.int32)
        distinct = np.where(examples == examples[:, :1], 0, self._lengths[examples] - 1)[:, 1:].sum(1)
        sizes = self._prompt_lengths[self._prompts[examples[:, 0]]] + self._lengths[examples[:, 0]] - 1 + distinct
        fitting = np.flatnonzero(sizes <= self.budget)
        if len(fitting) == len(examples):
            return corpus, 0
        longest = int(sizes.argmax())
        name = "".join(corpus.names_of([tuple(examples[longest])]))
        number = f"{len(examples) - len(fitting)} of {len(examples)} examples"
        key = f"{section}.max_tokens_per_batch".removeprefix(".")
        said = f"{key}: {self.budget}: {number} have more tokens; the longest, {name}, has {sizes[longest]}"
        if not len(fitting):
            raise UserError(f"{said}; expected at least {sizes.min()}, the shortest's")
        logger.warning("%s; they are set aside", said)
        return corpus.only(fitting), len(examples) - len(fitting)
