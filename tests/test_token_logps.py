import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from allo_kernels import Positions, head, head_parts, head_row_gradient, head_torch, token_logps
from allo_kernels.launching import blocks_of_device, recording
from allo_kernels.tools import check_head
from allo_kernels.tools.check import Exact, allowed_error, distance
from allo_kernels.tools.workspace import workspace
from tests.conftest import DEVICE


def full_logits(hidden, weight, targets, bias=None, softcap=None, temperature=1.0):
    return check_head.full_logits(hidden, weight, bias, targets, softcap, temperature)[0]


def inputs(n, d, v, dtype, bias, device=DEVICE, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=draw).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=draw) / d**0.5).to(device, dtype).requires_grad_()
    bias = torch.randn(v, generator=draw).to(device, dtype).requires_grad_() if bias else None
    targets = torch.randint(0, v, (n,), generator=draw).to(device)
    targets[::4] = -100
    upstream = torch.randn(n, generator=draw).to(device)  # not ones: a wrong weighting must show
    upstream[1::5] = 0.0
    return hidden, weight, bias, targets, upstream


# Rows, width and vocabulary that are no multiple of any block; 400009 words leave room for ten rows a chunk.
@pytest.mark.parametrize("n, d, v", [(1, 3, 5), (63, 17, 1000), (23, 8, 400009)])
@pytest.mark.parametrize("softcap, temperature, bias", [(None, 1.0, False), (5.0, 1.0, True), (None, 0.7, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_full_logits(n, d, v, softcap, temperature, bias, dtype):
    hidden, weight, bias, targets, upstream = inputs(n, d, v, dtype, bias)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    settings = {"softcap": softcap, "temperature": temperature}

    def run(function, cast):
        held = [None if leaf is None else cast(leaf) for leaf in (hidden, weight, bias)]
        logps = function(held[0], held[1], targets, bias=held[2], **settings)
        return [logps, *torch.autograd.grad((logps * upstream.to(logps)).sum(), leaves)]

    truth = run(full_logits, lambda leaf: leaf.double())
    double = [None if leaf is None else leaf.double() for leaf in (hidden, weight, bias)]
    _, exponent = check_head.full_logits(*double, targets, softcap, temperature)
    exact = [Exact(tensor, exponent, logarithm=index == 0) for index, tensor in enumerate(truth)]
    for ours, torchs, true in zip(run(token_logps, lambda x: x), run(full_logits, lambda x: x), exact, strict=True):
        assert distance(ours, true.value) <= allowed_error(torchs, true)


# A cap far above the logits hardly changes them: by exp alone tanh would keep an absolute 1e-7, times the cap.
@pytest.mark.parametrize("softcap", [0.1, 30.0, 1e5])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_caps_of_any_size(softcap, impl):
    hidden, weight, _, targets, upstream = inputs(9, 8, 40, torch.float32, False)

    def run(function, cast, **settings):
        logps = function(cast(hidden), cast(weight), targets, softcap=softcap, **settings)
        return [logps, *torch.autograd.grad((logps * upstream).sum(), [hidden, weight])]

    _, exponent = check_head.full_logits(hidden.double(), weight.double(), None, targets, softcap, 1.0)
    ours, plain = run(token_logps, lambda x: x, impl=impl), run(full_logits, lambda x: x)
    for found, torchs, true in zip(ours, plain, run(full_logits, lambda x: x.double()), strict=True):
        assert distance(found, true) <= allowed_error(torchs, Exact(true, exponent))


def test_a_frozen_weight_costs_nothing_and_zero_rows_are_skipped(monkeypatch):
    hidden, weight, _, targets, upstream = inputs(16, 4, 11, torch.float32, False, torch.device("cpu"))
    rows = []

    for name in ("target_and_lse", "d_logits"):
        original = getattr(head_torch, name)
        counting = lambda found, *rest, run=original: rows.append(len(found.targets)) or run(found, *rest)  # noqa: E731
        monkeypatch.setattr(head_torch, name, counting)
    logps = token_logps(hidden, weight.detach(), targets)
    (logps * upstream).sum().backward()
    assert rows == [int((targets != -100).sum()), int(((targets != -100) & (upstream != 0)).sum())]
    assert weight.grad is None and hidden.grad is not None


# Widths that share 64, 1 and 4096 with a block of positions; budgets that cut the vocabulary into several chunks, the
# last a short one: for the compact gradient at the first and third width, for the dense one at the second.
@pytest.mark.parametrize("n, d, v", [(5, 64, 2100), (5, 33, 3300), (2, 4096, 50)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_chunks_of_the_vocabulary(n, d, v, impl, monkeypatch):
    monkeypatch.setattr(head_parts, "CHUNK_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr(head_parts, "MIN_WORDS", 16)
    hidden, weight, _, targets, upstream = inputs(n, d, v, torch.float32, False)
    positions = Positions.pack((torch.rand(v * d, device=DEVICE) < 0.03).nonzero().squeeze(1), v * d)
    values = weight.detach().view(-1)[positions.unpack()].requires_grad_()
    d_hidden, d_weight = torch.autograd.grad((full_logits(hidden, weight, targets) * upstream).sum(), [hidden, weight])
    settings = {"values": values, "positions": positions, "impl": impl}
    (token_logps(hidden, weight, targets, **settings) * upstream).sum().backward()
    torch.testing.assert_close(values.grad, d_weight.view(-1)[positions.unpack()], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, d_hidden, rtol=1e-5, atol=1e-6)
    assert weight.grad is None
    (token_logps(hidden, weight, targets, impl=impl) * upstream).sum().backward()
    torch.testing.assert_close(weight.grad, d_weight, rtol=1e-5, atol=1e-6)


# Two blocks of rows, with a gradient for all that count, for some, and for none.
@pytest.mark.parametrize("share, impl", [(1.0, "torch"), (0.5, "torch"), (0.0, "torch"), (0.7, "triton")])
@pytest.mark.parametrize("exact", [True, False], ids=["as on a CPU", "as on a GPU"])
def test_blocks_of_rows(share, impl, exact, monkeypatch):
    monkeypatch.setattr(head_parts, "BLOCK_BYTES", 128 * 4 * 8)
    if not exact:
        monkeypatch.setattr(head, "_at_most", lambda counts, known: max(known, 1))
    hidden, weight, bias, targets, upstream = inputs(260, 8, 30, torch.float32, True)
    upstream[torch.rand(260) >= share] = 0.0
    positions = Positions.pack(torch.arange(0, 240, 7, device=DEVICE), 240)
    values = weight.detach().view(-1)[positions.unpack()].requires_grad_()
    compact = {"values": values, "positions": positions}

    def run(function, leaves, **settings):
        logps = function(hidden, weight, targets, bias=bias, **settings)
        return [logps, *torch.autograd.grad((logps * upstream).sum(), leaves)]

    truth = run(full_logits, [hidden, weight, bias])
    truth.append(truth[2].view(-1)[positions.unpack()])
    counts = int((targets != -100).sum()), int(((targets != -100) & (upstream != 0)).sum())
    exactly = {"target_rows": counts[0], "gradient_rows": counts[1]}
    for known in ({}, exactly, {"gradient_rows": counts[1] + 3}, {"gradient_rows": 260}):
        dense = run(token_logps, [hidden, weight, bias], impl=impl, **known)
        picked = run(token_logps, [hidden, values], impl=impl, **known, **compact)
        torch.testing.assert_close([*dense, picked[2]], truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(picked[:2], truth[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_without_a_target_get_no_gradient_however_large_their_logits(impl, monkeypatch):
    """As on a GPU, where the host knows of too many rows; exp of these logits is no number."""
    monkeypatch.setattr(head, "_at_most", lambda counts, known: max(known, 1))
    hidden, weight, _, targets, upstream = inputs(9, 8, 40, torch.float32, False)
    weight = (100 * weight).detach().requires_grad_()
    targets[-1] = -100  # with which the rows are filled up
    truth = torch.autograd.grad((full_logits(hidden, weight, targets) * upstream).sum(), [hidden, weight])
    for known in (9, 8):
        logps, lse = token_logps(hidden, weight, targets, gradient_rows=known, with_lse=True, impl=impl)
        found = torch.autograd.grad(logps, [hidden, weight], torch.where(targets == -100, torch.nan, upstream))
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3)
        given = (hidden.detach(), weight.detach(), targets, lse, upstream, slice(3, 30))
        rows = head_row_gradient(*given, gradient_rows=known, impl=impl)
        torch.testing.assert_close(rows, truth[1][3:30], rtol=1e-3, atol=1e-3)
    logps = token_logps(hidden, weight, targets, gradient_rows=0, impl=impl)
    assert torch.autograd.grad((logps * upstream).sum(), hidden)[0].isnan().any()


def test_how_many_rows_a_device_works_on():
    """Too few, be it none, must show as NaN, which no row at all would not."""
    counts = torch.zeros(3, dtype=torch.bool, device="meta")
    assert [head._at_most(counts, known) for known in (0, 1, 2)] == [1, 1, 2]
    assert head._at_most(torch.tensor([True, False, True]), 3) == 2


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_comes_out_may_be_changed_in_place(impl):
    hidden, weight, _, targets, upstream = inputs(9, 8, 40, torch.float32, False)
    logps = token_logps(hidden, weight, targets, impl=impl)
    (expected,) = torch.autograd.grad((2 * logps * upstream).sum(), hidden)
    logps, lse = token_logps(hidden, weight, targets, with_lse=True, impl=impl)
    lse.zero_()
    torch.testing.assert_close(torch.autograd.grad((logps.mul_(2) * upstream).sum(), hidden)[0], expected)


def test_on_a_cpu_rows_without_a_gradient_have_no_logits_in_backward(monkeypatch):
    """However many the host says may have one."""
    hidden, weight, _, targets, upstream = inputs(9, 8, 40, torch.float32, False, torch.device("cpu"))
    upstream[::2], rows, plain = 0.0, [], head_torch.d_logits
    monkeypatch.setattr(head_torch, "d_logits", lambda given, *of: rows.append(len(given.targets)) or plain(given, *of))
    logps = token_logps(hidden, weight, targets, gradient_rows=9)
    torch.autograd.grad((logps * upstream).sum(), hidden)
    assert set(rows) == {int(((targets != -100) & (upstream != 0)).sum())} and max(rows) < 9


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_wrong_number_of_rows_is_nan(impl):
    hidden, weight, _, targets, upstream = inputs(9, 8, 40, torch.float32, False)
    counts, known = int((targets != -100).sum()), int(((targets != -100) & (upstream != 0)).sum())
    for wrong in (counts - 1, counts + 1, 9):
        assert token_logps(hidden, weight, targets, target_rows=wrong, impl=impl).isnan().all()
    logps = token_logps(hidden, weight, targets, target_rows=counts, gradient_rows=known - 1, impl=impl)
    assert logps.isfinite().all() and torch.autograd.grad((logps * upstream).sum(), hidden)[0].isnan().any()


def test_targets_that_nobody_checked(monkeypatch):
    """On a device whose number of rows the host knows: one outside the vocabulary is NaN, not another's memory."""
    hidden, weight, _, targets, _ = inputs(9, 8, 40, torch.float32, False)
    monkeypatch.setattr(head, "_check_targets", lambda *_: None)
    targets[1], counts = 40, int((targets != -100).sum())
    for impl in ("torch", "triton"):
        logps = token_logps(hidden, weight, targets, target_rows=counts, impl=impl)
        assert logps.isnan().tolist() == [row == 1 for row in range(9)]


def needs_products_on_meta():
    """Those of PyTorch 2.11 know no addmm with an out_dtype."""
    left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((2, 3), (3, 2)))
    try:
        torch.addmm(torch.empty(2, 2, device="meta"), left, right, out_dtype=torch.float32)
    except TypeError as error:
        pytest.skip(f"PyTorch {torch.__version__}: {error}")


class Asked(TorchDispatchMode):
    """Inside, lists the operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_nothing_asks_the_device_what_the_host_knows(monkeypatch):
    """Tensors on meta have no numbers to read, and each wait that is left raises."""
    needs_products_on_meta()
    hidden = torch.empty(64, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight, targets = torch.empty(2100, 16, dtype=torch.bfloat16, device="meta"), torch.empty(64, device="meta").long()
    known = {"target_rows": 60, "gradient_rows": 30}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with recording((9, 0)), Asked() as asked:
        logps, lse = token_logps(hidden, weight, targets, with_lse=True, impl="triton", **known)
        torch.autograd.grad(logps.sum(), hidden)
        rows = {"rows": slice(16, 32), "gradient_rows": 30}
        part = head_row_gradient(hidden.detach(), weight, targets, lse, lse, impl="triton", **rows)
        assert part.shape == (16, 16)
        for missing in known:
            with pytest.raises(RuntimeError, match="token_logps.* waits for the host"):
                logps = token_logps(hidden, weight, targets, impl="triton", **{**known, missing: None})
                torch.autograd.grad(logps.sum(), hidden)
    assert "aten.addmm.dtype_out" in asked.names, "no product is rounded before it is added"
    assert not {"aten.mm.default", "aten.addmm.default", "aten.addmm_.default"} & {*asked.names}


def test_the_gradient_of_some_rows():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=draw), torch.randn(20, 8, generator=draw, requires_grad=True)
    targets, upstream = torch.tensor([0, 7, 19, 7, -100]), torch.randn(5, generator=draw)
    logps, lse = token_logps(hidden, weight, targets, with_lse=True)
    (whole,) = torch.autograd.grad(logps, weight, upstream)
    for rows in (slice(3, 9), slice(None), slice(None, 5), slice(-5, None), slice(15, 99), slice(9, 3)):
        part = head_row_gradient(hidden, weight.detach(), targets, lse, upstream, rows)
        torch.testing.assert_close(part, whole[rows])
    with pytest.raises(ValueError, match="lse: expected .* on cpu"):
        head_row_gradient(hidden, weight.detach(), targets, lse.to("meta"), upstream, slice(3))
    with pytest.raises(ValueError, match="rows: expected neighbouring ones"):
        head_row_gradient(hidden, weight.detach(), targets, lse, upstream, slice(0, 10, 2))


# What `plan` counts on, whatever the number of rows: beside it are only the results.
@pytest.mark.parametrize("rows, width, words", [(8192, 4096, 128_256), (65_536, 4096, 128_256), (65_536, 8192, 32_001)])
@pytest.mark.parametrize("head", ["frozen", "5 %"])
def test_workspace(rows, width, words, head):
    needs_products_on_meta()
    for gradient_rows in (rows, rows // 2):
        results = 2 * rows * width + (4 * width * words // 20 if head == "5 %" else 0)
        beside = workspace(rows, width, words, head, gradient_rows) - results
        assert beside <= head_parts.workspace_bytes(2) + (3 << 20)
    assert head_parts.workspace_bytes(2) == 384 << 20


def test_one_row_of_any_stride():
    """It is contiguous whatever lies between it and a next one; a tensor descriptor needs 16 bytes there."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.empty_strided((1, 16), (3, 1), dtype=torch.bfloat16, device=DEVICE)
    hidden.copy_(torch.randn(1, 16, generator=draw))
    weight, targets = torch.randn(40, 16, generator=draw).to(DEVICE, torch.bfloat16), torch.tensor([7], device=DEVICE)
    with blocks_of_device((9, 0)):
        logps = token_logps(hidden, weight, targets, impl="triton")
    torch.testing.assert_close(logps, token_logps(hidden.float(), weight.float(), targets), rtol=1e-5, atol=1e-5)


def test_no_rows_at_all():
    hidden = torch.randn(3, 4, requires_grad=True)
    logps = token_logps(hidden, torch.randn(5, 4), torch.full((3,), -100))
    logps.sum().backward()
    assert torch.equal(logps, torch.zeros(3)) and torch.equal(hidden.grad, torch.zeros(3, 4))
    assert token_logps(torch.zeros(0, 4), torch.randn(5, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(5, 3)}, "hidden, weight"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets: expected shape"),
        ({"targets": torch.tensor([0, 5])}, "targets: expected -100 or 0..4, got 0..5"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "targets: expected torch.int64"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "targets: expected a tensor on cpu"),
        ({"hidden": torch.zeros(2, 4).double()}, "hidden: expected torch.bfloat16 or"),
        ({"weight": torch.zeros(5, 4).half()}, "weight: expected torch.float32, got torch.float16"),
        ({"weight": torch.zeros(4, 5).T}, "weight: expected a contiguous tensor"),
        ({"bias": torch.zeros(4)}, "bias: expected shape"),
        ({"bias": torch.zeros(5).long()}, "bias: expected torch.bfloat16 or"),
        ({"softcap": 0.0}, "softcap: expected a positive number"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"values": torch.zeros(1)}, "values, positions: expected both or neither"),
        ({"values": torch.zeros(1), "positions": Positions.pack(torch.tensor([3]), 9)}, "weight: expected"),
        ({"values": torch.zeros(2), "positions": Positions.pack(torch.tensor([3]), 20)}, "values: expected shape"),
        ({"impl": "cuda"}, "impl: expected"),
    ],
)
def test_bad_arguments(change, message):
    given = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        token_logps(**given | change)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_words_that_a_bias_rules_out(impl):
    """Padded vocabularies: a whole tile of logits may be -inf; an fp32 bias is not rounded to the weight's dtype."""
    hidden, weight, _, targets, upstream = inputs(6, 8, 70, torch.bfloat16, False)
    bias = torch.linspace(-1, 1, 70, device=DEVICE)
    bias[:32], targets = -torch.inf, targets.clamp(min=40)
    logps = token_logps(hidden, weight, targets, bias=bias, impl=impl)
    exact = full_logits(hidden.double(), weight.double(), targets, bias.double())
    assert (logps - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert torch.autograd.grad((logps * upstream).sum(), hidden)[0].isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_autocast_changes_nothing(impl):
    hidden, weight, _, targets, _ = inputs(9, 8, 40, torch.float32, False)
    plain = token_logps(hidden, weight, targets, impl=impl)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = token_logps(hidden, weight, targets, impl=impl)
        gradient = torch.autograd.grad(cast.sum(), hidden)[0]
    assert torch.equal(cast, plain) and torch.equal(gradient, torch.autograd.grad(plain.sum(), hidden)[0])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_second_derivative_is_refused(impl):
    hidden, weight, _, targets, _ = inputs(4, 8, 20, torch.float32, False)
    logps = token_logps(hidden, weight, targets, impl=impl)
    (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
