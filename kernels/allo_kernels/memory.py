"""Memory of a stretch of work: what the process or the GPU held at most, what its tensors hold."""

import ctypes
import gc
import os
import resource
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def reset_peak(device: torch.device) -> None:
    """Forgets earlier peaks and gives freed memory back, so that each stage answers for itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # a sandbox may forbid it; the peak is then the whole process's
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Largest amount held since `reset_peak`: resident bytes of the process, or allocated bytes of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def live_bytes() -> int:
    """Of all tensors that exist in this process, on any device, each storage once."""
    gc.collect()
    found = [held for held in gc.get_objects() if isinstance(held, Tensor)]
    tensors = [held for held in found if held.device.type != "meta" and not isinstance(held, FakeTensor)]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (held.untyped_storage() for held in tensors)}
    return sum(storages.values())


def device_bytes() -> int:
    """Memory of this process's GPU, or its share of the machine's where the launcher's processes have none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def available_bytes() -> int:
    """Of the machine's memory, and of what its containers may have (Linux's cgroups), what is free; a process's share.

    Where nothing says what is free, all of it.
    """
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    free += [1024 * found for found in _numbers(Path("/proc/meminfo"), "MemAvailable:")]
    groups, own = [""], Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.exists() else ():
        number, kinds, place = line.split(":", 2)
        groups += [place.strip("/")] * (number == "0" or "memory" in kinds.split(","))
    for group in groups:
        for folder, limit, taken, cached in _CONTAINERS:
            most, now = (_numbers(Path(folder, group, f"memory.{name}")) for name in (limit, taken))
            if most and now:  # files that are only kept for whoever reads them again make room
                free.append(most[0] - now[0] + sum(_numbers(Path(folder, group, "memory.stat"), cached)))
    return max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# Versions 2 and 1: where, and what limit, use and files that are kept are called.
_CONTAINERS = (
    ("/sys/fs/cgroup", "max", "current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
)


def _numbers(path: Path, name: str = "") -> list[int]:
    """What a file says, or says of a name; nothing where it lacks that, or has a word there."""
    if not path.is_file():
        return []
    lines = [line.removeprefix(name).split() for line in path.read_text().splitlines() if line.startswith(name)]
    return [int(words[0]) for words in lines[:1] if words and words[0].isdigit()]


class Live(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that operations make, until they are gone. most: at one time.

    counts: which tensors.
    """

    def __init__(self, counts: Callable[[Tensor], bool] = lambda _: True):
        super().__init__()
        self.counts = counts
        self.now = self.most = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and self.counts(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in before and id(storage) not in self._storages:  # a view makes nothing
                    self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
