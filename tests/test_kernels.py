"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter."""

import importlib
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from allo_fast.config import TrainConfig
from allo_fast.data.batch import collate
from allo_fast.method.objectives import Preference
from allo_fast.method.policy import SparsePolicy
from allo_fast.training.engine import Trainer
from allo_kernels import Positions, dispatch, gather, scatter_, token_logps
from allo_kernels.head_torch import Head
from allo_kernels.head_triton import TILES, tile_name
from allo_kernels.launching import blocks_of_device
from allo_kernels.positions import SPAN
from allo_kernels.tools.check import Exact, allowed_error
from allo_kernels.tools.check_cases import cases
from tests.conftest import DEVICE, pair_corpus, random_selection, tiny_llama

CASES = list(cases(large=DEVICE.type == "cuda"))


@pytest.mark.parametrize("case", CASES, ids=[f"{case.op}-{case.name}" for case in CASES])
def test_equals_its_definition(case):
    wrong = [finding for finding in case.run(DEVICE) if not finding.passed]
    assert not wrong


def tiles(large, capability):
    """The cases of each tile that a device of this capability runs, or the interpreter."""
    found = {}
    for case in (case.arguments[0] for case in cases(large) if case.op == "token_logps"):
        with blocks_of_device(case.capability or capability):
            device, head = "meta" if capability else "cpu", Head(case.softcap, case.temperature, None, None)
            weight = torch.empty(case.words, case.width, dtype=case.dtype, device=device)
            for kernel in ("target_and_lse", "d_logits"):
                found.setdefault(tile_name(weight, weight, head, kernel), []).append(case)
    return found


def test_every_tile_that_is_launched_is_tried():
    """On a device with more row tiles than one group and several steps of K; in the interpreter at least with two."""
    on_devices = tiles(True, (8, 0)) | tiles(True, (9, 0))
    assert on_devices.keys() == TILES.keys() - {"interpreter"}
    assert tiles(True, (9, 0)).keys() >= TILES.keys() - {"interpreter"}, "the smaller devices' too"
    interpreted = tiles(False, None)
    assert interpreted.keys() == TILES.keys()
    for group, every in ((16, on_devices), (1, interpreted), (16, {"interpreter": interpreted["interpreter"]})):
        for name, tried in every.items():
            tile = TILES[name]
            assert any(
                case.counted > group * tile.BLOCK_N and case.width > 2 * tile.BLOCK_D - 1 and case.words > tile.BLOCK_V
                for case in tried
            ), name
            assert any(case.words % tile.BLOCK_V and case.counted % tile.BLOCK_N for case in tried), name


def off_by(operation, ulps, first=lambda x: x):
    """An fp32 operation of numpy whose results are off by so many units, each result always by the same amount."""

    def run(*operands):
        if operands[0].dtype != np.float32:
            return operation(*operands)
        exact = operation(*(first(x).astype(np.float64) for x in operands)).astype(np.float32)
        noise = ((exact.view(np.uint32) * np.uint32(2654435761)) >> 16).astype(np.float64) / 32768 - 1
        return (exact * (1 + ulps * noise * np.finfo(np.float32).eps)).astype(np.float32)

    return run


# fp32 alone, whose tolerance is small enough to notice; each operation that has exp, division or a square root.
ROUGH = "token_logps-N(33|63|200).*fp32|masked_adamw_-P70001|key_token_dpo_loss-B3-.*-f0.[16]"
ROUGH = [case for case in CASES if re.match(ROUGH, f"{case.op}-{case.name}")]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a device's own arithmetic is tried by every other test")
@pytest.mark.parametrize("case", ROUGH, ids=[f"{case.op}-{case.name}" for case in ROUGH])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_allowed_covers_a_devices_arithmetic(case, monkeypatch):
    """As the PTX manual has it: exp by a power of 2 (2 ulp), division 2 ulp, square root and logarithm 1."""
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    power = off_by(np.exp2, 2, first=lambda x: x * np.float32(np.log2(np.e)))
    approximate = {"create_exp": power, "create_log": off_by(np.log, 1), "create_sqrt": off_by(np.sqrt, 1)}
    for name, operation in approximate.items():
        monkeypatch.setattr(builder, name, lambda self, x, operation=operation: self.unary_op(x, operation))
    divide = off_by(np.divide, 2)
    monkeypatch.setattr(builder, "create_fdiv", lambda self, x, y: self.binary_op(x, y, divide))
    assert not [finding for finding in case.run(DEVICE) if not finding.passed]


def test_what_is_allowed():
    exact = Exact(torch.tensor([2.0, -4.0], dtype=torch.double))
    eps = torch.finfo(torch.float32).eps
    assert allowed_error(torch.tensor([2.5, -4.0]), exact) == 0.5 + 16 * eps
    assert allowed_error(torch.tensor([2.0, -4.0]), Exact(exact.value, exponent=3.0)) == (16 + 4 * 48) * eps
    assert allowed_error(torch.tensor([2.0, -4.0]), Exact(exact.value, 3.0, logarithm=True)) == (16 + 48) * eps
    assert allowed_error(torch.tensor([2.0, -4.0]).bfloat16(), exact) == 16 * torch.finfo(torch.bfloat16).eps
    rounded = Exact(exact.value, factors=torch.bfloat16)
    assert allowed_error(torch.tensor([2.0, -4.0]), rounded) == 16 * eps + 4 * torch.finfo(torch.bfloat16).eps


def test_addresses_beyond_32_bits():
    """4 GiB of address space of which a few pages are touched; block 32768 starts at 2**31, byte 2**32."""
    dense = torch.empty(2**31 + SPAN, dtype=torch.bfloat16, device=DEVICE)
    ends = [5, 2**31 - 1, 2**31 + 7]
    positions = Positions.pack(torch.tensor(ends, device=DEVICE), dense.numel())
    scatter_(dense, positions, torch.tensor([1.0, 2.0, 3.0], device=DEVICE), impl="triton")
    assert dense[ends].tolist() == [1, 2, 3]
    dense[ends] = torch.tensor([4.0, 5.0, 6.0], device=DEVICE).bfloat16()
    assert gather(dense, positions, impl="triton").tolist() == [4, 5, 6]


def test_the_choice_is_said_once(caplog, monkeypatch):
    dispatch._automatic.cache_clear()
    with caplog.at_level(logging.INFO, "allo_kernels"):
        for _ in range(2):
            assert dispatch.choose("op", "auto", len, "pair_loss.as_ratio", torch.device("cpu")) is len
    assert caplog.messages == ["op: torch (the CPU runs PyTorch)"]


# What a machine with a GPU would say, without the GPU.
@pytest.mark.parametrize(
    "capability, triton, expected, level",
    [((9, 0), True, "op: triton", "INFO"), ((7, 5), True, "7.5 is older than 8.0", "WARNING")]
    + [((9, 0), False, "Triton is not installed", "WARNING")],
)
def test_an_old_gpu_or_no_triton_runs_the_definition(capability, triton, expected, level, caplog, monkeypatch):
    dispatch._automatic.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: triton or None)
    kernel = dispatch.importlib.import_module("allo_kernels.pair_loss").as_ratio
    with caplog.at_level(logging.INFO, "allo_kernels"):
        chosen = dispatch.choose("op", "auto", len, "pair_loss.as_ratio", torch.device("cuda"))
    assert chosen is (kernel if level == "INFO" else len)
    assert [record.levelname for record in caplog.records] == [level] and expected in caplog.text
    if level == "WARNING":
        with pytest.raises(ValueError, match=f"impl: 'triton' cannot run op here: .*{expected}"):
            dispatch.choose("op", "triton", len, "pair_loss.as_ratio", torch.device("cuda"))
    dispatch._automatic.cache_clear()


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' cannot run token_logps here: a CPU tensor needs TRITON_INTERPRET=1"):
        token_logps(torch.zeros(1, 4), torch.zeros(5, 4), torch.zeros(1).long(), impl="triton")


def test_nothing_imports_triton_before_a_kernel_runs():
    code = "import sys, allo_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_training_run_on_the_kernels(monkeypatch, tmp_path):
    """Locate, four steps of key-token DPO, a swap: the engine gives the same with every operation's kernel."""

    def run(folder):
        model = tiny_llama().to(DEVICE)
        policy = SparsePolicy(model, random_selection(model, 0.1))
        corpus = pair_corpus(problems=2)
        settings = TrainConfig(learning_rate=1e-2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
        trainer = Trainer(policy, corpus, Preference(0.3, epsilon=0.5), settings, folder)
        losses = [metrics.loss for metrics in trainer.run()]
        policy.write_back()
        with policy.reference():
            logps = policy.response_logps(collate(corpus, corpus.examples).to(DEVICE))
        return torch.tensor(losses), torch.cat([value.detach() for value in policy.values.values()]), logps

    folders = [tmp_path / name for name in ("torch", "triton")]
    for folder in folders:
        folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_automatic", lambda op, device: "torch")
        definition = run(folders[0])
    ran = []
    monkeypatch.setattr(dispatch, "_automatic", lambda op, device: ran.append(op) or "triton")
    for ours, theirs in zip(run(folders[1]), definition, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert {*ran} == {
        "token_logps",
        "gather",
        "scatter_",
        "swap_",
        "masked_adamw_",
        "key_token_dpo_loss",
        "topk_threshold",
    }
