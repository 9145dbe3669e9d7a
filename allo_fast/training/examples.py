"""What a stage trains on, step by step, and what the reference model says of it."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from allo_fast import ranks
from allo_fast.config import TrainConfig
from allo_fast.data.batch import Batch, Corpus, collate, plan_micro_batches, plan_steps
from allo_fast.durable import Damaged, load_tensors, save_tensors

logger = logging.getLogger(__name__)


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
        token_weights: Sequence[Sequence[float]] | None = None,
    ):
        self.corpus, self.token_weights = corpus, token_weights
        self.micro_batches = plan_micro_batches(corpus, config.per_device_train_batch_size, seed)
        per_step, epochs = config.gradient_accumulation_steps, config.num_train_epochs
        ranks.agree_on("corpus", (corpus, token_weights))
        self.epochs = plan_steps(len(self.micro_batches), per_step, epochs, seed)
        self.steps = [step for epoch in self.epochs for step in epoch]

    def collate(self, micro: int, share_prompts: bool) -> Batch:
        """On the CPU."""
        examples = self.micro_batches[micro]
        return collate(self.corpus, examples, share_prompts=share_prompts, token_weights=self.token_weights)

    def share(self, step: int) -> list[tuple[int, float]]:
        """This rank's micro-batches of a step, with weight 1; as many on every rank, some perhaps with weight 0."""
        micros, world, rank = self.steps[step], ranks.world_size(), ranks.rank()
        local_micro_batches = [(micro, 1.0) for micro in micros[rank::world]]
        return local_micro_batches + [(micros[0], 0.0)] * (-(-len(micros) // world) - len(local_micro_batches))


def reference_logps(
    path: Path,
    mark: str,
    examples: Examples,
    opened: AbstractContextManager[Callable[[Batch], Tensor]],
    share_prompts: bool,
    device: torch.device,
) -> Generator[tuple[int, int], None, dict[str, Tensor]]:
    """By the number of a micro-batch, fp32 [R, L] on the CPU; yields (micro-batches done, all).

    Computed once, and kept in a file for a resumed run. mark: of what they are; others are not taken.
    opened: the reference's log-probabilities, while entered.
    """
    if ranks.on_main(lambda: _is_own(path, mark)):
        return load_tensors(path)[0]
    reference: dict[str, Tensor] = {}
    with opened as compute:
        for first in range(0, len(examples.micro_batches), ranks.world_size()):
            # Where fewer are left than there are ranks, some compute the first one too: a sharded model needs them all.
            micro = first + ranks.rank() if first + ranks.rank() < len(examples.micro_batches) else first
            with torch.no_grad():
                logps = compute(examples.collate(micro, share_prompts).to(device)).cpu()
            for part in ranks.gather({str(micro): logps}):
                reference |= part
            yield len(reference), len(examples.micro_batches)
    if ranks.is_main():
        save_tensors(path, reference, {"mark": mark})
    return reference


def _is_own(path: Path, mark: str) -> bool:
    try:
        return path.exists() and load_tensors(path)[1]["mark"] == mark
    except Damaged as error:
        logger.warning("%s; computed again", error)
        return False
