"""The processes of a run, and what passes between them. One code path: a single process skips communication.

DeepSpeed starts the process group and carries every message; torchrun or the deepspeed launcher starts the processes.
In a group that somebody else started, as transformers does, torch carries them.
"""

import gc
import hashlib
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from allo_fast.config import UserError, first_line

T = TypeVar("T")


def launched_world_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_rank() -> int:
    """Which of them this is, before they have met."""
    return int(os.environ.get("RANK", 0))


def name_accelerator() -> None:
    """Tells DeepSpeed, whoever imports it, that there is no GPU; it warns when it must find out."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def import_deepspeed():
    """DeepSpeed, quiet. Raises UserError where it is not installed."""
    name_accelerator()
    try:
        import deepspeed
    except ImportError:
        raise UserError('deepspeed is not installed: pip install "allo-fast[deepspeed]"') from None
    if not torch.cuda.is_available():
        # Only its inference calls this; it would be compiled, under a lock that a killed process leaves behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Of torch's functions that DeepSpeed calls under their old names, once for each call.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    return deepspeed


def start(timeout_s: float) -> None:
    """Joins the process group. Raises UserError when not every process arrives in time, or DeepSpeed is missing."""
    if dist.is_initialized():
        return
    deepspeed = import_deepspeed()
    os.environ.setdefault("LOCAL_RANK", "0")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_s)
    try:
        if launched_world_size() == 1:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        deepspeed.init_distributed(timeout=timeout, verbose=False, auto_mpi_discovery=False)
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = first_line(error)
        raise UserError(f"not all {launched_world_size()} processes met at {where} in {timeout_s:g} s: {why}") from None


def stop() -> None:
    """Leaves the process group, where one was joined; engines must be closed before.

    DeepSpeed has groups of its own, and gloo's threads, should they outlive the interpreter, abort the process.
    """
    if dist.is_initialized():
        import deepspeed

        gc.collect()  # what closed engines held of the groups
        deepspeed.comm.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Returns when every rank came here."""
    if world_size() > 1:
        dist.barrier()


def gather(value: T) -> list[T]:
    """What every rank holds, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; a UserError there is raised everywhere."""
    if world_size() == 1:
        return work()
    outcome: list = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all ranks, on every rank."""
    if world_size() == 1:
        return tensor
    total = tensor.to(_wire(), copy=True)
    _carrier().all_reduce(total)
    return total.to(tensor.device)


def reduce_share(tensor: Tensor) -> Tensor:
    """Of a 1-D tensor's sum over all ranks this rank's part, cut as `bounds` says."""
    if world_size() == 1:
        return tensor
    part = -(-len(tensor) // world_size())
    padded = torch.nn.functional.pad(tensor.to(_wire()), (0, part * world_size() - len(tensor)))
    _carrier().reduce_scatter_tensor(total := padded.new_empty(part), padded)
    begin, end = bounds(len(tensor))
    return total[: end - begin].to(tensor.device)


def concatenate(part: Tensor) -> Tensor:
    """Every rank's 1-D tensor one after another; they may differ in length."""
    if world_size() == 1:
        return part
    lengths = gather(len(part))
    padded = torch.zeros(max(lengths), dtype=part.dtype, device=_wire())
    padded[: len(part)] = part
    pieces = [torch.empty_like(padded) for _ in lengths]
    _carrier().all_gather(pieces, padded)
    return torch.cat([piece[:length] for piece, length in zip(pieces, lengths, strict=True)]).to(part.device)


def bounds(size: int) -> tuple[int, int]:
    """Where in a weight of `size` entries this rank's part begins and ends; parts are as ZeRO-3 cuts them."""
    part = -(-size // world_size())
    return min(size, part * rank()), min(size, part * (rank() + 1))


def share(weight: Tensor) -> tuple[int, Tensor]:
    """This rank's part of a weight, flat, and where in the weight it begins."""
    begin, end = bounds(getattr(weight, "ds_numel", weight.numel()))
    if hasattr(weight, "ds_tensor"):
        return begin, weight.ds_tensor.detach().view(-1)[: end - begin]
    return begin, weight.detach().reshape(-1)[begin:end]


def agree(facts: dict[str, str]) -> None:
    """Raises UserError on every rank, naming the keys, where a rank holds other values than rank 0."""
    for number, other in enumerate(every := gather(facts)):
        if different := sorted(key for key in every[0].keys() | other.keys() if every[0].get(key) != other.get(key)):
            raise UserError(f"rank {number} has another {', another '.join(different)} than rank 0")


def agree_on(name: str, parts: Iterable[object]) -> None:
    """Raises UserError on every rank where one holds something else than rank 0.

    parts: gone through once where there are several ranks; arrays, or what `repr` shows in full.
    """
    if world_size() > 1:
        digest = hashlib.sha256()
        for part in parts:
            is_array = isinstance(part, np.ndarray)
            digest.update(repr((part.shape, part.dtype) if is_array else part).encode())
            if is_array:
                digest.update(np.ascontiguousarray(part))
        agree({name: digest.hexdigest()})


def _carrier() -> ModuleType:
    """Whose collectives to call: DeepSpeed's, which Traffic counts, where it was started."""
    comm = sys.modules.get("deepspeed.comm")
    return comm if comm and comm.is_initialized() else dist


def _wire() -> torch.device:
    """Where tensors must lie to travel."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


class Traffic:
    """Counts the bytes of tensors handed to collectives, by operation; of input and output the larger counts.

    Stands in front of DeepSpeed's communication backend, through which all of a step's collectives pass.
    """

    def __init__(self):
        from deepspeed.comm import comm

        self.bytes: Counter[str] = Counter()
        self._backend = comm.cdb._backend if isinstance(comm.cdb, Traffic) else comm.cdb
        comm.cdb = self

    def __getattr__(self, name: str):
        attribute = getattr(self._backend, name)
        if not name.startswith(("all_", "reduce", "broadcast", "gather", "scatter")) or not callable(attribute):
            return attribute

        def counted(*arguments, **keywords):
            if world_size() > 1:
                self.bytes[name] += max((_nbytes(argument) for argument in (*arguments, *keywords.values())), default=0)
            return attribute(*arguments, **keywords)

        return counted


def _nbytes(argument: object) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_nbytes, argument)) if isinstance(argument, list | tuple) else 0
