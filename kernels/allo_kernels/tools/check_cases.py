"""The shapes, dtypes and selections that `check` tries, and what each operation should give there in fp64."""

import itertools
from collections.abc import Iterator

import torch

from allo_kernels import gather, masked_adamw_, scatter_, swap_
from allo_kernels.tools.check import BF16, FP32, NAMES, Case, Exact, drawing, selected
from allo_kernels.tools.check_head import token_logps_cases
from allo_kernels.tools.check_rows import pair_cases, topk_cases

_SEED = 20_240_613  # for rounding by chance


def cases(large: bool = False) -> Iterator[Case]:
    """large: shapes and sizes for a GPU, beside the small ones for the interpreter."""
    yield from _compact_cases(large)
    yield from _adamw_cases(large)
    yield from token_logps_cases(large)
    yield from topk_cases(large)
    yield from pair_cases(large)


# Sizes around a block of 65536; selections of nothing, everything, both ends, a few percent.
def _compact_cases(large: bool) -> Iterator[Case]:
    sizes = ((1,), (70_001,), (65_536, 3, 0, 131_073)) + (((1 << 24, 1 << 26),) if large else ())
    for sizes_, kind, dtype in itertools.product(sizes, ("none", "ends", "5%", "all"), (BF16, FP32)):
        name = f"P{'+'.join(map(str, sizes_))}-{kind}-{NAMES[dtype]}"
        yield Case("gather", name, _gather_case, (sizes_, kind, dtype))
        yield Case("scatter_", name, _scatter_case, (sizes_, kind, dtype))


def _adamw_cases(large: bool) -> Iterator[Case]:
    sizes = ((70_001,), (65_536, 3, 0, 131_073)) + (((1 << 24, 1 << 26),) if large else ())
    for sizes_, grad, weight in itertools.product(sizes, (FP32, BF16), (BF16, FP32, None)):
        name = f"P{'+'.join(map(str, sizes_))}-grad-{NAMES[grad]}-weight-{NAMES.get(weight)}"
        yield Case("masked_adamw_", name, _adamw_case, (sizes_, "5%", grad, weight))
        if weight == BF16:
            yield Case("masked_adamw_", name + "-by-chance", _adamw_case, (sizes_, "5%", grad, weight, _SEED))
    for seed in (None, _SEED) if large else ():
        yield Case("masked_adamw_", f"in a CUDA graph, rounding seed {seed}", _graph_case, (seed,))
    yield Case("masked_adamw_", "K0", _adamw_case, ((5,), "none", FP32, BF16))


def _gather_case(device, sizes, kind, dtype):
    random, parts = drawing(device), selected(device, sizes, kind).parts
    dense = [random(size, dtype=dtype) for size in sizes]
    before = [random(len(part)) for part in parts]

    def outputs(impl):
        found = {}
        for index, (weight, part, start) in enumerate(zip(dense, parts, before, strict=True)):
            total = gather(weight, part, out=start.clone(), accumulate=True, impl=impl)
            found |= {f"picked {index}": gather(weight, part, impl=impl), f"sum {index}": total}
        return found

    return outputs, {}


def _scatter_case(device, sizes, kind, dtype):
    random, positions = drawing(device), selected(device, sizes, kind)
    dense, values = [random(size, dtype=dtype) for size in sizes], random(len(positions))

    def outputs(impl):
        written, swapped = [weight.clone() for weight in dense], [weight.clone() for weight in dense]
        held = values.to(dtype, copy=True)
        scatter_(written, positions, values, impl=impl)
        swap_(swapped, positions, held, impl=impl)
        one = dense[0].clone()
        scatter_(one, positions.parts[0], values[: positions.counts[0]], impl=impl)
        swap_(one, positions.parts[0], values[: positions.counts[0]].to(dtype), impl=impl)
        found = {"written": torch.cat(written), "swapped": torch.cat(swapped), "held": held, "one": one}
        if dtype == BF16:
            by_chance = [weight.clone() for weight in dense]
            scatter_(by_chance, positions, values, rounding_seed=_SEED, impl=impl)
            alone = dense[0].clone()
            scatter_(alone, positions.parts[0], values[: positions.counts[0]], rounding_seed=_SEED, impl=impl)
            found |= {"by chance": torch.cat(by_chance), "one by chance": alone}
        return found

    return outputs, {}


def _adamw_case(device, sizes, kind, grad_dtype, weight_dtype, seed=None):
    positions, steps = selected(device, sizes, kind), 3
    settings = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    random = drawing(device)
    start, grads = random(len(positions)), [random(len(positions), dtype=grad_dtype) for _ in range(steps)]
    scale = torch.tensor(0.37, device=device)

    def outputs(impl):
        state, weights = _adamw_state(start, positions, weight_dtype or FP32)
        where = {"weight": weights, "positions": positions, "rounding_seed": seed} if weight_dtype else {}
        for number, grad in enumerate(grads, 1):
            step = torch.tensor(float(number), device=device)
            masked_adamw_(*_with(state, grad), step=step, grad_scale=scale, impl=impl, **where, **settings)
        return state | ({"wrong in weight": _wrong(weights, positions, state["values"], seed)} if weight_dtype else {})

    return outputs, _exact_adamw(start, [grad.double() * float(scale) for grad in grads], [settings["lr"]] * steps)


def _exact_adamw(start, grads, rates):
    """In fp64, with betas of 0.9 and 0.999, a decay of 0.1, eps of 1e-8."""
    p, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for number, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p * (1 - 0.1 * lr) - lr * (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
    return {"values": Exact(p), "exp_avg": Exact(m), "exp_avg_sq": Exact(v)}


def _adamw_state(start, positions, dtype):
    weights = [torch.zeros(size, dtype=dtype, device=start.device) for size in positions.sizes]
    zeros = {name: torch.zeros_like(start) for name in ("exp_avg", "exp_avg_sq")}
    return {"values": start.clone(), **zeros}, weights


def _wrong(weights, positions, values, seed):
    """How many weights are not what they should be: zero where nothing is selected, else the rounded value."""
    wanted = [torch.zeros_like(weight) for weight in weights]
    scatter_(wanted, positions, values, rounding_seed=seed, impl="torch")
    return (torch.cat(weights) != torch.cat(wanted)).sum()


def _graph_case(device, seed):
    """Two replays, each with another step and learning rate: a graph must read them from the device."""
    positions, random = selected(device, (70_001, 3), "5%"), drawing(device)
    start, grad = random(len(positions)), random(len(positions))
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}

    def outputs(impl):
        step, lr = torch.tensor(1.0, device=device), torch.tensor(1e-2, device=device)
        state, weights = _adamw_state(start, positions, BF16)
        where = {"weight": weights, "positions": positions, "rounding_seed": seed}

        def update():
            masked_adamw_(*_with(state, grad), step=step, lr=lr, impl=impl, **where, **settings)

        update()  # compiles, and makes the table of addresses
        again = update
        if impl == "triton":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                update()
            again = graph.replay
        for _ in range(2):
            step += 1
            lr *= 0.5
            again()
        return state | {"wrong in weight": _wrong(weights, positions, state["values"], seed)}

    return outputs, _exact_adamw(start, [grad.double()] * 3, [1e-2, 5e-3, 2.5e-3])


def _with(state, grad):
    return state["values"], grad, state["exp_avg"], state["exp_avg_sq"]
