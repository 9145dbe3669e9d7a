"""What enters and leaves a model's segments, in files: computed once, read by every pass. Ranks divide the work."""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from allo_fast import ranks
from allo_fast.durable import own, save_tensors
from allo_fast.locating.files import is_own
from allo_fast.locating.losses import Losses, Part
from allo_fast.locating.segments import Segments
from allo_fast.locating.taps import Taps
from allo_fast.model.logps import HeadPass
from allo_fast.training.steps import MicroBatch

logger = logging.getLogger(__name__)


class Captured:
    """At `cuts`, in every micro-batch. cuts: all that a pass begins or ends at."""

    def __init__(self, segments: Segments, cuts: Sequence[int], losses: Losses, folder: Path, mark: str):
        self.segments, self.cuts, self.losses, self.folder, self.mark = segments, cuts, losses, folder, mark

    @property
    def own(self) -> list[Part]:
        """What this rank captures."""
        return self.losses.parts()[ranks.rank() :: ranks.world_size()]

    def has_room(self, reserved: int) -> bool:
        """Whether the files that are not there yet fit on the disk; said where they do not.

        reserved: bytes of other files that passes will write there.
        """
        missing = [(micro, share) for micro, share in self.losses.parts() if not self._is_there(micro, share)]
        if not missing:
            return True
        batch, loss = self.losses.of(*missing[0])
        (states,), (gradients,), head, upstream = self.segments.capture(batch, loss, self.cuts[:1])
        a_batch = len(self.cuts) * (states.nbytes + gradients.nbytes)
        a_batch += head.hidden.nbytes + head.lse.nbytes + upstream.nbytes
        positions = sum(self.losses.examples.tokens(micro) for micro, _ in missing)
        needed = reserved + a_batch * positions / batch.tokens
        if fits := needed <= (free := shutil.disk_usage(self.folder).free):
            return fits
        sizes = needed / 1e9, self.folder, free / 1e9
        logger.warning(
            "locating: every pass runs the whole model: states of its layers take %.1f GB, %s has %.1f left; "
            "locate.pairs limits them",
            *sizes,
        )
        return fits

    def capture(self) -> Iterator[None]:
        """Yields after each micro-batch of this rank."""
        for micro, share in self.own:
            if not self._is_there(micro, share):
                states, gradients, head, upstream = self.segments.capture(*self.losses.of(micro, share), self.cuts)
                tensors = {"head": head.hidden, "lse": head.lse, "upstream": upstream}
                tensors |= {f"states.{cut}": tensor for cut, tensor in zip(self.cuts, states, strict=True)}
                tensors |= {f"gradients.{cut}": tensor for cut, tensor in zip(self.cuts, gradients, strict=True)}
                save_tensors(path := self._path(micro, share), tensors, {"mark": own(path, self.mark)})
            yield

    def backward(self, micro: MicroBatch, share: float, runs: Sequence[tuple[int, int]], taps: Taps) -> None:
        """Through the head and the segments `runs`, the last first, as one backward pass comes to them."""
        batch, loss = self.losses.of(micro, share)
        with safe_open(self._path(micro, share), "pt", str(batch.input_ids.device)) as file:

            def read(name: str) -> Tensor:
                # Copied: what is computed may depend in its last bit on how memory is aligned, which a file's is not.
                return file.get_tensor(name).clone()

            if taps.has_head:
                taps.take_head(HeadPass(read("head"), batch.targets, read("lse")), read("upstream"))
            for first, last in reversed(runs):
                start = read(f"states.{first - 1}") if first else None
                gradient = read(f"gradients.{last}") if last < self.segments.last_stage else None
                self.segments.backward(batch, loss, (first, last), start, gradient)

    def _is_there(self, micro: MicroBatch, share: float) -> bool:
        return is_own(self._path(micro, share), self.mark)

    def _path(self, micro: MicroBatch, share: float) -> Path:
        examples = hashlib.sha256(repr(micro).encode()).hexdigest()[:16]
        return self.folder / f"cuts-{examples}-{share.hex()}.safetensors"
