"""`allo-fast kernels check | aot | bench`, and uninstalled `python -m allo_kernels ...`."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "trl", "liger-kernel", "cut-cross-entropy")
_STATE = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m allo_kernels", description=__doc__)
    add_arguments(parser)
    given = parser.parse_args(arguments)
    return given.command(given)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (rows, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--json", type=Path, metavar="FILE", help="also every row, with machine and versions")
        command.set_defaults(command=lambda given, rows=rows: _finish(rows(), given.json))


def _checked() -> Iterator[dict]:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is now
    from allo_kernels.tools.check_cases import cases

    device = this_device()
    for case in cases(large=device.type == "cuda"):
        for finding in case.run(device):
            text = f"{finding.output}: error {finding.error:.3g}, allowed {finding.allowed:.3g}"
            yield {"text": f"{finding.op} {finding.case}  {text}", **asdict(finding), "passed": finding.passed}


def _compiled() -> Iterator[dict]:
    os.environ.pop("TRITON_INTERPRET", None)
    from allo_kernels.tools import aot, workspace

    for row in aot.compile_all(listed=True):
        used = f"registers {row.registers}, shared {row.shared_bytes} B, stack {row.stack_bytes} B, spills {row.spills}"
        used += f", instructions {row.instructions}" + f", of the K loop {row.loop}" * (row.loop > 0)
        name = f"{row.target} {row.model} {row.kernel} ({row.variant})"
        yield {"text": f"{name}  {used}{', wgmma' * row.wgmma}", **asdict(row), "passed": row.passed}
    for row in workspace.workspaces(aot.MODELS.values()):
        shape = f"N={row.rows} D={row.width} V={row.words}, {row.head} head, {row.gradient_rows} rows with a gradient"
        yield {"text": f"token_logps {shape}  workspace {row.mib:.0f} MiB", **asdict(row)}


def _measured() -> Iterator[dict]:
    from allo_kernels.tools import bench
    from allo_kernels.tools.bench_cases import CPU, GPU

    device, rows = this_device(), []
    for ceilings, row in bench.run(device, GPU if device.type == "cuda" else CPU):
        rows.append(row)
        text = f"{row.op}, {row.contender}: {row.absent or f'{row.median_ms:.4g} ms'}"
        yield {"text": text, **asdict(row), "ceilings": asdict(ceilings), "passed": not row.failed}
    print(bench.as_markdown(rows))
    print(f"ceilings: copy {ceilings.gbytes_per_s:.3g} GB/s, matrix product {ceilings.tflops:.3g} TFLOP/s")


_COMMANDS = {
    "check": (_checked, "every kernel against its definition, on the GPU or in Triton's interpreter"),
    "aot": (
        _compiled,
        "compile every kernel for sm_80 and sm_90, no GPU needed; a spill is a failure",
    ),
    "bench": (_measured, "time, memory, bandwidth and FLOP rate of every operation beside its rivals"),
}


def this_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def machine() -> dict[str, str]:
    """Device, its state, versions and date, for whoever reads the numbers later."""
    device = this_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found = {"device": name, "date": time.strftime("%Y-%m-%d"), "python": sys.version.split()[0]}
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, **device_state()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def device_state() -> dict[str, str]:
    """Driver, clocks in MHz, power in W and temperature of the GPU now, as nvidia-smi has them; nothing without it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return {}
    uuid = torch.cuda.get_device_properties(this_device()).uuid  # its number is another one's without this environment
    command = [tool, f"--query-gpu={_STATE}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.strip().split(", ")
    return dict(zip(_STATE.split(","), said, strict=False))


def _finish(found: Iterator[dict], path: Path | None) -> int:
    """Prints each row, and writes all there are: minutes of work that end early have shown what they found."""
    started, rows, failed = time.perf_counter(), [], 0
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = machine()
    for row in found:
        text = row.pop("text")
        rows.append(row)
        if path:
            path.write_text(json.dumps({**about, "rows": rows}, indent=1))
        if "passed" in row:
            failed += not row["passed"]
            text = f"{'pass' if row['passed'] else 'FAIL'}  {text}"
        if text:
            print(text, flush=True)
    print(f"{len(rows)} rows, {failed} failed, {time.perf_counter() - started:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
