import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from allo_kernels.__main__ import main
from allo_kernels.tools import aot

MODELS = ("Llama-3-8B", "uneven")  # sizes that 16 divides, and sizes that nothing does; the command has more
COMPILE = f"""
import dataclasses, json
from allo_kernels.tools.aot import compile_all
print(json.dumps([dataclasses.asdict(row) for row in compile_all({MODELS})]))
"""


def test_every_kernel_compiles_for_both_targets_without_a_spill(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": "kernels"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [aot.Compiled(**row) for row in json.loads(done.stdout)]
    assert all(row.passed and row.registers for row in rows) and any(row.wgmma for row in rows)
    kernels = "target_and_lse d_logits gather scatter masked_adamw histogram key_token_dpo".split()
    found = {(row.kernel, row.target, row.model) for row in rows}
    assert found == {(kernel, target, model) for kernel in kernels for target in aot.TARGETS for model in MODELS}


# Each kind of failure alone; fp32 has no matrix instructions to show.
def test_what_fails():
    good = aot.Compiled("Llama-3-8B", "d_logits", "bf16", "sm_90", 195, 1024, 0, 0, True, 0)
    assert good.passed and replace(good, wgmma=False, variant="fp32").passed
    for change in ({"stack_bytes": 8}, {"spills": 1}, {"wgmma": False}, {"narrow_products": 1}):
        assert not replace(good, **change).passed


def test_products_of_indices_in_32_bits():
    vector, scalar, wide = (
        f"arith.muli %a, %b : {kind} loc(1)" for kind in ("tensor<64xi32>", "i32", "tensor<64xi64>")
    )
    assert [aot.narrow_products(line, True) for line in (vector, scalar, wide)] == [1, 1, 0]
    assert aot.narrow_products(scalar, scalars=False) == 0, "a tile's number, which no tensor's size enters"


def test_what_is_counted():
    lines = ["MOV R1, R2", "@P0 BRA 0x0040", "HMMA.16816.F32 R4, R8", "IADD3 R1, R1", "@!P1 BRA 0x0020", "BRA 0x0050"]
    listing = "".join(f"        /*{16 * n:04x}*/   {line} ; /* 0x00 */\n" for n, line in enumerate([*lines, "NOP"]))
    assert aot.count(listing) == (6, 3) and aot.count("") == (0, 0)


def test_the_interpreter_cannot_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1: compiling needs a process without it"):
        next(aot.compile_all())


def test_one_failure_fails_the_command(monkeypatch, capsys, tmp_path):
    good = aot.Compiled("Llama-3-8B", "gather", "bf16", "sm_80", 32, 0, 0, 0, False, 0)
    monkeypatch.setattr(aot, "compile_all", lambda listed: iter([good, replace(good, spills=2)]))
    monkeypatch.setattr(aot, "MODELS", {})
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["aot", "--json", str(tmp_path / "rows.json")]) == 1
    said = capsys.readouterr().out
    assert "pass  sm_80 Llama-3-8B gather" in said and "FAIL" in said and "2 rows, 1 failed" in said
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["passed"] for row in written["rows"]] == [True, False] and written["torch"] and written["device"]
