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
    """Of the machine's memory, or of what its container may have, what is free; this process's share of it."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if (path := Path("/proc/meminfo")).exists():
        free.append(int(path.read_text().split("MemAvailable:")[1].split()[0]) * 1024)
    most, taken = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))
    if most.exists() and taken.exists() and (limit := most.read_text().strip()) != "max":
        free.append(int(limit) - int(taken.read_text()))
    return max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


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
