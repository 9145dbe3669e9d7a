"""What a stage trains on, step by step, and what the reference model says of it."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from allo_fast import ranks
from allo_fast.config import TrainConfig
from allo_fast.data.arrays import Chained, Ragged
from allo_fast.data.batch import Batch, Corpus, collate, plan_micro_batches, plan_steps
from allo_fast.durable import is_own, make_folder, open_tensors, own, save_tensors

PART_NUMBERS = 1 << 22  # that a file of reference log-probabilities has at most, if a micro-batch has fewer


class Examples:
    """A corpus cut into micro-batches and optimizer steps, the same on every rank and for any number of them.

    steps: per optimizer step the numbers of its micro-batches. token_weights: per response, one number per token.
    Raises UserError where a rank has another corpus.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: TrainConfig,
        seed: int = 0,
        token_weights: Ragged | list[list[float]] | None = None,
    ):
        self.corpus, self.token_weights = corpus, token_weights
        self.micro_batches = plan_micro_batches(corpus, config.per_device_train_batch_size, seed)
        per_step, epochs = config.gradient_accumulation_steps, config.num_train_epochs
        weights = token_weights.arrays() if isinstance(token_weights, Ragged) else [token_weights]
        ranks.agree_on("corpus", chain(corpus.arrays(), weights))
        self.epochs = plan_steps(len(self.micro_batches), per_step, epochs, seed)
        self.steps = Chained(self.epochs)

    def collate(self, micro: int, share_prompts: bool) -> Batch:
        """On the CPU."""
        examples = self.micro_batches[micro]
        return collate(self.corpus, examples, share_prompts=share_prompts, token_weights=self.token_weights)

    def names_of(self, micro: int) -> list[str]:
        """Of the rows that a micro-batch came from."""
        return self.corpus.names_of(self.micro_batches[micro])

    def share(self, step: int) -> list[tuple[int, float]]:
        """This rank's micro-batches of a step, with weight 1; as many on every rank, some perhaps with weight 0."""
        micros, world, rank = self.steps[step], ranks.world_size(), ranks.rank()
        local_micro_batches = [(micro, 1.0) for micro in micros[rank::world]]
        return local_micro_batches + [(micros[0], 0.0)] * (-(-len(micros) // world) - len(local_micro_batches))


class Reference(Mapping[int, Tensor]):
    """By the number of a micro-batch, fp32 [R, L] on the CPU, mapped from files of as many micro-batches each.

    A file has `values`, those of all its micro-batches one after another, and `shapes` [n, 2]. mark: of what they are.
    """

    def __init__(self, folder: Path, mark: str, examples: Examples):
        self.folder, self.mark, self.count = folder, mark, len(examples.micro_batches)
        largest = examples.micro_batches.rows.shape[1] * examples.micro_batches.size
        largest *= int(examples.corpus.responses.tokens.lengths.max())
        self.size = max(1, PART_NUMBERS // largest)
        self._parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __getitem__(self, micro: int) -> Tensor:
        if micro not in range(self.count):
            raise KeyError(micro)
        part, place = divmod(micro, self.size)
        if part not in self._parts:
            self._parts[part] = self._opened(part)
        values, shapes, ends = self._parts[part]
        return values[ends[place] - shapes[place].prod() : ends[place]].view(*shapes[place].tolist())

    def path(self, part: int) -> Path:
        return self.folder / f"reference-{part:05d}.safetensors"

    def micros(self, part: int) -> range:
        return range(part * self.size, min(self.count, (part + 1) * self.size))

    def missing(self) -> list[int]:
        """The parts that are not there; of those that are damaged this is said."""
        return [part for part in range(-(-self.count // self.size)) if not is_own(self.path(part), self.mark)]

    def save(self, part: int, logps: list[Tensor]) -> None:
        """logps: of its micro-batches, in order."""
        make_folder(self.folder)
        values, shapes = torch.cat([item.flatten() for item in logps]), torch.tensor([item.shape for item in logps])
        save_tensors(path := self.path(part), {"values": values, "shapes": shapes}, {"mark": own(path, self.mark)})

    def _opened(self, part: int) -> tuple[Tensor, Tensor, Tensor]:
        file = open_tensors(self.path(part), check=False)
        shapes = file.get_tensor("shapes")
        return file.get_tensor("values"), shapes, shapes.prod(1).cumsum(0)


def reference_logps(
    folder: Path,
    mark: str,
    examples: Examples,
    opened: AbstractContextManager[Callable[[Batch], Tensor]],
    share_prompts: bool,
    device: torch.device,
) -> Generator[tuple[int, int], None, Reference]:
    """Yields (micro-batches done, all).

    Computed once, file by file in `folder`, so that a killed stage goes on. opened: the reference's log-probabilities,
    while entered.
    """
    reference = Reference(folder, mark, examples)
    if not (missing := ranks.on_main(reference.missing)):
        return reference
    done = reference.count - sum(len(reference.micros(part)) for part in missing)
    with opened as compute:
        for part in missing:
            logps: list[Tensor] = []
            micros = reference.micros(part)
            for first in micros[:: ranks.world_size()]:
                # Where fewer are left than there are ranks, some compute the first too: a sharded model needs them all.
                micro = first + ranks.rank() if first + ranks.rank() in micros else first
                with torch.no_grad():
                    found = compute(examples.collate(micro, share_prompts).to(device)).cpu()
                logps += ranks.gather(found)[: len(micros) - len(logps)]
                yield done + len(logps), reference.count
            ranks.on_main(lambda part=part, logps=logps: reference.save(part, logps))
            done += len(micros)
    return reference
