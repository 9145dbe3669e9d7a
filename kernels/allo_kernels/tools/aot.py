"""Every kernel compiled ahead of time, as it would be launched on real models, for GPUs that need not be here."""

import contextlib
import functools
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from allo_kernels import adamw_triton, compact_triton, head_triton, pair_loss_triton, topk_triton
from allo_kernels.dispatch import interpreting
from allo_kernels.head_torch import Head, Rows
from allo_kernels.launching import Launch, recording
from allo_kernels.positions import Positions, blocks_of
from allo_kernels.topk import DIGITS

MODELS = {  # width, words; the last has sizes that nothing divides
    "Llama-3-8B": (4096, 128_256),
    "Qwen3-8B": (4096, 151_936),
    "SmolLM2-135M": (576, 49_152),
    "GPT-2": (768, 50_257),
    "uneven": (2056, 50_001),
}
TARGETS = {"sm_80": (8, 0), "sm_90": (9, 0)}
_TOKENS, _PAIRS = 8192, 32
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes of a multiprocessor, as the assembler reports it."""

    model: str
    kernel: str
    variant: str
    target: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int  # instructions that move registers to or from local memory
    wgmma: bool  # the matrix instructions of sm_90 are in the PTX
    narrow_products: int  # multiplications of indices in 32 bits, which overflow in large tensors
    instructions: int = 0  # where they were listed
    loop: int = 0  # of them, those of the shortest loop with matrix instructions, over K

    @property
    def passed(self) -> bool:
        matrix_path = self.target == "sm_90" and self.kernel in _MATRIX_KERNELS and "fp32" not in self.variant
        return not (self.stack_bytes or self.spills or self.narrow_products or (matrix_path and not self.wgmma))


_MATRIX_KERNELS = ("target_and_lse", "d_logits")


def compile_all(
    models: Iterable[str] = MODELS, targets: Iterable[str] = TARGETS, listed: bool = False
) -> Iterator[Compiled]:
    """Yields after each kernel; listed: with its instructions, which take half a second to list.

    Raises ValueError under TRITON_INTERPRET=1, where kernels are Python functions.
    """
    if interpreting():
        raise ValueError("TRITON_INTERPRET=1: compiling needs a process without it")
    for target in targets:
        for model in models:
            for variant, launcher in _launchers(*MODELS[model]):
                with recording(TARGETS[target]) as launches:
                    launcher()
                with _device_of(target):
                    yield from (_compile(model, variant, target, launch, listed) for launch in launches)


def _compile(model: str, variant: str, target: str, launch: Launch, listed: bool) -> Compiled:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces a default of 3.10
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)
    usage = _cuobjdump(compiled.asm["cubin"], "-res-usage")
    stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
    # Without memory of their own they have nowhere to spill to.
    assembly = _cuobjdump(compiled.asm["cubin"], "-sass") if listed or stack or local else ""
    instructions, loop = count(assembly)
    kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    return Compiled(
        model=model,
        kernel=kernel,
        variant=variant,
        target=target,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=stack,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", assembly)),
        wgmma="wgmma.mma_async" in compiled.asm["ptx"],
        narrow_products=narrow_products(compiled.asm["ttir"], scalars=kernel not in _MATRIX_KERNELS),
        instructions=instructions,
        loop=loop,
    )


def narrow_products(ttir: str, scalars: bool) -> int:
    """Products in 32 bits, of index vectors and if asked of scalars: where a program's part of a tensor begins. The
    matrix kernels' scalars are of tiles, which end with the rows and the words."""
    return len(re.findall(rf"arith.muli [^:]*: (?:tensor<[^>]*xi32>{'|i32' * scalars})", ttir))


def count(assembly: str) -> tuple[int, int]:
    """Instructions, and those of the shortest loop with matrix instructions, 0 without one; NOPs are none."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?!\s|NOP)(.*?);", assembly, re.MULTILINE)
    listed = [(int(address, 16), text) for address, text in found]
    loops = []
    for end, text in listed:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) <= end:
            body = [inside for address, inside in listed if int(branch[1], 16) <= address <= end]
            loops += [len(body)] * any("MMA" in inside for inside in body)
    return len(listed), min(loops, default=0)


@functools.cache  # one kernel serves many models
def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def _device_of(target: str) -> Iterator[None]:
    """Inside, Triton believes that its device is of this kind."""
    driver.set_active(_Device(GPUTarget("cuda", int(target.removeprefix("sm_")), 32)))
    try:
        yield
    finally:
        driver.set_active(None)  # found anew when it is asked for


@dataclass(frozen=True)
class _Device:
    """The part of Triton's driver interface that compiling asks."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # caches of compiled kernels are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0


def _launchers(width: int, vocabulary: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is launched for a model, on tensors that have shapes and dtypes but no memory."""
    for dtype, name in ((_BF16, "bf16"), (_FP16, "fp16"), (_FP32, "fp32")):
        weight, rows = _meta(vocabulary, width, dtype=dtype), _rows(width, dtype)
        for softcap, bias in ((None, None), (30.0, _meta(vocabulary, dtype=dtype))):
            head = Head(softcap, 1.0, None, head_triton)
            variant = name + ("+cap+bias" if softcap else "")
            yield variant, lambda r=rows, w=weight, b=bias, h=head: h.kernels.target_and_lse(r, w, b, h)
            yield variant, lambda r=rows, w=weight, b=bias, h=head: h.kernels.d_logits(r, w, b, 16, h)
        yield from ((f"{name} {label}", launcher) for label, launcher in _compact(width, dtype))
        scores = _meta(vocabulary * width, dtype=dtype)
        for shift, bits in DIGITS:
            yield f"{name} digit {shift}", lambda s=scores, d=(shift, bits): topk_triton.histogram(s, *d, 0)
    valid, logps = _meta(_PAIRS, 512, dtype=torch.bool), _meta(_PAIRS, 512)
    pair = (logps, logps, logps, logps, valid, valid)
    yield "fp32", lambda: pair_loss_triton.key_token_dpo_loss(*pair, 0.1, 0.1, 0.0)


def _compact(width: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    size = width * width
    entries = size // 20
    starts, low = _meta(blocks_of(size) + 1, dtype=torch.int64), _meta(entries, dtype=torch.uint16)
    at, dense, scalar = Positions(low, starts, (size,), (entries,)), _meta(width, width, dtype=dtype), _meta()
    values, held = _meta(entries), _meta(entries, dtype=dtype)
    adam = (values, values, values, values, scalar, 1e-5, 0.9, 0.999, 1e-8, 0.0, scalar)
    yield "one tensor", lambda: compact_triton.gather(dense, at, held)
    yield "accumulated", lambda: compact_triton.gather(dense, at, values, True)
    yield "one tensor", lambda: compact_triton.scatter_(dense, at, values)
    yield "many tensors", lambda: compact_triton.scatter_([dense], at, values)
    yield "many tensors, swapped", lambda: compact_triton.swap_([dense], at, held)
    yield "many tensors", lambda: adamw_triton.masked_adamw_(*adam, [dense], at, None)
    yield "without weights", lambda: adamw_triton.masked_adamw_(*adam, None, None, None)
    if dtype == _BF16:
        yield "one tensor, rounded by chance", lambda: compact_triton.scatter_(dense, at, values, 7)
        yield "many tensors, rounded by chance", lambda: compact_triton.scatter_([dense], at, values, 7)
        yield "many tensors, rounded by chance", lambda: adamw_triton.masked_adamw_(*adam, [dense], at, 7)


def _rows(width: int, dtype: torch.dtype) -> Rows:
    targets = _meta(_TOKENS, dtype=torch.int32)
    return Rows(_meta(_TOKENS, width, dtype=dtype), targets, _meta(_TOKENS), _meta(_TOKENS))


def _meta(*shape: int, dtype: torch.dtype = _FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
