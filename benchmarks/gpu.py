"""The kernels on a GPU: every one against its definition, then all benchmarks; one JSON file and one Markdown table.

Runs uninstalled (`PYTHONPATH=.:kernels python -m benchmarks gpu --out DIR`) and needs torch, triton, transformers,
safetensors and numpy at most; rivals (trl, liger-kernel, cut-cross-entropy) may come from wheels in a folder. What was
found is written after every row: a machine that is taken away costs the rest. A result that differs from the
reference's at the benchmarked size ends the run.
"""

import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from allo_kernels.__main__ import device_state, machine, this_device
from allo_kernels.tools import bench
from allo_kernels.tools.bench_cases import GPU, Sizes
from allo_kernels.tools.check import Case
from allo_kernels.tools.check_cases import cases


@dataclass
class Results:
    """What one run found; `folder` gets it after every row."""

    folder: Path
    machine: dict
    ceilings: dict = field(default_factory=dict)
    checks: list[dict] = field(default_factory=list)
    rows: list[bench.Row] = field(default_factory=list)
    wrong: str = ""  # what ended the run
    state_after: dict = field(default_factory=dict)

    @property
    def failed(self) -> list[dict]:
        broken = [row for row in self.rows if row.failed]
        rows = [{"op": r.op, "case": r.shape, "output": r.contender, "error": r.absent} for r in broken]
        wrong = [{"op": "benchmarks", "case": "ended", "output": self.wrong, "error": "wrong"}] if self.wrong else []
        return [check for check in self.checks if not check["passed"]] + rows + wrong

    def write(self) -> None:
        content = {**self.machine, "state_after": self.state_after, "ceilings": self.ceilings, "checks": self.checks}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu.json").write_text(json.dumps({**content, "rows": [*map(asdict, self.rows)]}, indent=1))
        (self.folder / "gpu.md").write_text(self.as_markdown())

    def as_markdown(self) -> str:
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        checked = f"{len(self.checks)} checks, {len(self.failed)} failed"
        failures = "".join(f"\n- {row['op']} {row['case']}, {row['output']}: {row['error']}" for row in self.failed)
        ceilings = ", ".join(f"{name} {value:.3g}" for name, value in self.ceilings.items())
        return f"{about}\n\n{checked}{failures}\n\nCeilings: {ceilings}\n\n{bench.as_markdown(self.rows)}\n"


def run(
    out: Path, sizes: Sizes | None = None, suite: Iterable[Case] | None = None, wheels: Path | None = None
) -> Results:
    """Raises SystemExit where there is no GPU, unless told what to run (tests do), and for a folder without wheels."""
    device = this_device()
    if device.type != "cuda" and sizes is None:
        raise SystemExit("python -m benchmarks gpu: no CUDA device; `allo-fast kernels bench` measures a CPU")
    if wheels is not None:
        add_wheels(wheels)
    results, started = Results(out, machine()), time.perf_counter()
    for case in suite or cases(large=True):
        for finding in case.run(device):
            results.checks.append({**asdict(finding), "passed": finding.passed})
        results.write()
    print(
        f"{len(results.checks)} checks, {len(results.failed)} failed, {time.perf_counter() - started:.0f} s", flush=True
    )
    try:
        for ceilings, row in bench.run(device, sizes or GPU):
            results.ceilings = asdict(ceilings)
            results.rows.append(row)
            results.write()
            print(f"{time.perf_counter() - started:.0f} s  {row.op}: {row.contender} {row.median_ms} ms", flush=True)
    except bench.WrongResult as wrong:
        results.wrong = str(wrong)
    results.state_after = device_state() if device.type == "cuda" else {}
    results.write()
    print(results.as_markdown())
    return results


def add_wheels(folder: Path) -> None:
    """Makes what is in the folder's wheels importable, after what is installed; nothing is installed."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--wheels {folder}: no wheel in it")
    target = tempfile.mkdtemp(prefix="wheels-")
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(target)
    sys.path.append(target)
