import pytest
import torch

from allo_kernels import Positions, masked_adamw_
from allo_kernels.tools.check import Exact, allowed_error, distance
from tests.conftest import DEVICE

SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def run(steps=5, k=1000, device_scalars=False, grad_scale=None, **changes):
    draw = torch.Generator().manual_seed(0)
    values, exp_avg, exp_avg_sq = torch.randn(k, generator=draw), torch.zeros(k), torch.zeros(k)
    settings = SETTINGS | changes
    for step in range(1, steps + 1):
        grad = torch.randn(k, generator=draw)
        if device_scalars:
            settings, step = SETTINGS | {"lr": torch.tensor(SETTINGS["lr"])}, torch.tensor(step)
        masked_adamw_(values, grad, exp_avg, exp_avg_sq, step=step, grad_scale=grad_scale, **settings)
    return values


def torchs(steps=5, k=1000, scale=1.0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(k, generator=draw).to(dtype))
    optimizer = torch.optim.AdamW([parameter], lr=3e-3, eps=1e-8, weight_decay=0.1)
    for _ in range(steps):
        parameter.grad = torch.randn(k, generator=draw).to(dtype) * scale
        optimizer.step()
    return parameter.detach()


def test_equals_torch_adamw():
    exact = torchs(dtype=torch.double)
    assert distance(run(), exact) <= allowed_error(torchs(), Exact(exact))


def steps_of(number, k, settings, impl="triton"):
    """Values and moments after `number` steps from 1.5 and zero, and what they are in fp64."""
    draw, kinds = torch.Generator().manual_seed(0), (torch.float, torch.double)
    state, exact = ([torch.full((k,), x, dtype=dtype, device=DEVICE) for x in (1.5, 0, 0)] for dtype in kinds)
    for step in range(1, number + 1):
        grad = torch.randn(k, generator=draw).to(DEVICE)
        values, *moments = state
        masked_adamw_(values, grad, *moments, step=step, eps=1e-8, impl=impl, **settings)
        p, m, v = exact
        m.lerp_(grad.double(), 1 - settings["beta1"])
        v.lerp_(grad.double().square(), 1 - settings["beta2"])
        m_hat, v_hat = m / (1 - settings["beta1"] ** step), v / (1 - settings["beta2"] ** step)
        p.mul_(1 - settings["lr"] * settings["weight_decay"]).sub_(settings["lr"] * m_hat / (v_hat.sqrt() + 1e-8))
    return state, exact


# 0.993 is off by 2.9e-8 in fp32, which every step would apply again: 4e-6 of exp_avg_sq. Roundings of single entries
# are random, and average out over 2048 of them.
def test_beta2_is_not_rounded():
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.993, "weight_decay": 0.0}
    (_, _, exp_avg_sq), (_, _, exact) = steps_of(300, 2048, settings)
    assert ((exp_avg_sq - exact) / exact).mean().abs() < 5e-7


# 1 - lr weight_decay is 1 in fp32 there. Steps of lr, five units in the last place, let the sum of decay and step round
# up as often as down.
def test_a_small_decay_is_not_lost():
    settings = {"lr": 6e-7, "beta1": 0.0, "beta2": 0.9, "weight_decay": 0.04}
    (values, *_), (exact, *_) = steps_of(300, 2048, settings)
    decay = 1.5 * 300 * 6e-7 * 0.04
    assert (values - exact).mean().abs() < 0.1 * decay


def test_by_hand():
    values, exp_avg, exp_avg_sq = torch.tensor([1.0]), torch.zeros(1), torch.zeros(1)
    settings = SETTINGS | {"lr": 0.5}
    masked_adamw_(values, torch.tensor([2.0]), exp_avg, exp_avg_sq, step=1, **settings)
    # The first step moves by lr * sign(gradient), after the decay of lr * weight_decay.
    assert values.item() == pytest.approx(1.0 * (1 - 0.5 * 0.1) - 0.5, abs=1e-6)
    assert exp_avg.item() == pytest.approx(0.2) and exp_avg_sq.item() == pytest.approx(0.004)


def test_scalars_may_be_tensors_and_gradients_scaled():
    torch.testing.assert_close(run(device_scalars=True), run(), rtol=1e-6, atol=1e-7)
    scaled = run(grad_scale=torch.tensor(1e-3))
    torch.testing.assert_close(scaled, torchs(scale=1e-3), rtol=1e-5, atol=1e-6)


def test_writes_the_rounded_values_through():
    weight, positions = torch.zeros(3, 4, dtype=torch.bfloat16), Positions.pack(torch.tensor([1, 5, 11]), 12)
    values, state = torch.tensor([1.0, 2.0, 3.0]), [torch.zeros(3), torch.zeros(3)]
    masked_adamw_(values, torch.ones(3), *state, step=1, weight=weight, positions=positions, **SETTINGS)
    expected = torch.zeros(12, dtype=torch.bfloat16).scatter(0, positions.unpack(), values.bfloat16())
    assert torch.equal(weight.view(-1), expected)


def test_repeats_bit_for_bit():
    assert torch.equal(run(), run())


def test_bad_arguments():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="exp_avg: expected torch.float32"):
        masked_adamw_(one, one, one.half(), one, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="grad: expected shape"):
        masked_adamw_(one, torch.zeros(2), one, one, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="expected both or neither"):
        masked_adamw_(one, one, one, one, step=1, weight=one, **SETTINGS)
    with pytest.raises(ValueError, match="exp_avg_sq: expected a tensor on cpu, got one on meta"):
        masked_adamw_(one, one, one, one.to("meta"), step=1, **SETTINGS)
    with pytest.raises(ValueError, match="values: expected a contiguous tensor"):
        masked_adamw_(torch.zeros(4)[::2], *[torch.zeros(2)] * 3, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="lr: expected shape"):
        masked_adamw_(one, one, one, one, step=1, **SETTINGS | {"lr": one})
    with pytest.raises(ValueError, match="values: expected shape"):
        masked_adamw_(one, one, one, one, step=1, weight=one, positions=Positions.pack(one.long()[:0], 1), **SETTINGS)
