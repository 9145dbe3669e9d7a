"""The shapes, dtypes and selections that `check` tries, and what each operation should give there in fp64."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from allo_kernels import (
    Positions,
    gather,
    key_token_dpo_loss,
    key_token_weights,
    masked_adamw_,
    scatter_,
    swap_,
    token_logps,
    top_fraction_weights,
    topk_threshold,
)
from allo_kernels.tools.check import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


def cases(large: bool = False) -> Iterator[Case]:
    """large: shapes and sizes for a GPU, beside the small ones for the interpreter."""
    yield from _compact_cases(large)
    yield from _adamw_cases(large)
    yield from _token_logps_cases(large)
    yield from _topk_cases(large)
    yield from _pair_cases(large)


# Sizes around a block of 65536; selections of nothing, everything, both ends, a few percent.
def _compact_cases(large: bool) -> Iterator[Case]:
    sizes = ((1,), (70_001,), (65_536, 3, 0, 131_073)) + (((1 << 24, 1 << 26),) if large else ())
    kinds = ("none", "ends", "5%") + (("all",) if not large else ())
    for sizes_, kind, dtype in itertools.product(sizes, kinds, (BF16, FP32)):
        name = f"P{'+'.join(map(str, sizes_))}-{kind}-{NAMES[dtype]}"
        yield Case("gather", name, _gather_case, (sizes_, kind, dtype))
        yield Case("scatter_", name, _scatter_case, (sizes_, kind, dtype))


def _adamw_cases(large: bool) -> Iterator[Case]:
    sizes = ((70_001,), (65_536, 3, 0, 131_073)) + (((1 << 24, 1 << 26),) if large else ())
    for sizes_, grad, weight in itertools.product(sizes, (FP32, BF16), (BF16, FP32, None)):
        name = f"P{'+'.join(map(str, sizes_))}-grad-{NAMES[grad]}-weight-{NAMES.get(weight)}"
        yield Case("masked_adamw_", name, _adamw_case, (sizes_, "5%", grad, weight))
    if large:
        yield Case("masked_adamw_", "in a CUDA graph", _graph_case)
    yield Case("masked_adamw_", "K0", _adamw_case, ((5,), "none", FP32, BF16))


# No size is a multiple of a block; then a cap, a bias and a temperature alone and together.
def _token_logps_cases(large: bool) -> Iterator[Case]:
    shapes = ((1, 3, 5), (63, 40, 300), (37, 64, 130)) + (((1000, 576, 49_152), (2048, 1024, 151_936)) if large else ())
    heads = ((None, 1.0, False), (5.0, 0.7, True), (5.0, 1.0, False), (None, 1.0, True))
    for (n, d, v), (cap, temperature, bias), dtype in itertools.product(shapes, heads, (BF16, FP16, FP32)):
        if n >= 1000 and (cap, temperature, bias) not in heads[:2]:
            continue
        name = f"N{n}-D{d}-V{v}-{NAMES[dtype]}-cap{cap}-T{temperature}" + "-bias" * bias
        yield Case("token_logps", name, _token_logps_case, (n, d, v, cap, temperature, bias, dtype))
    yield Case("token_logps", "all ignored", _token_logps_case, (5, 8, 33, None, 1.0, False, FP32, 0))


def _topk_cases(large: bool) -> Iterator[Case]:
    for size, dtype in itertools.product((1, 5000) + ((1 << 26,) if large else ()), (FP32, BF16, FP16)):
        for k in sorted({1, size // 20, size} - {0}):
            name = f"P{size}-k{k}-{NAMES[dtype]}"
            yield Case("topk_threshold", name, _topk_case, (size, k, dtype))


def _pair_cases(large: bool) -> Iterator[Case]:
    shapes = ((1, 1, 1), (3, 7, 50), (3, 70, 2100)) + (((64, 512, 5000),) if large else ())
    for (b, chosen, rejected), fraction in itertools.product(shapes, (0.0, 0.1, 0.4, 0.65, 1.0)):
        name = f"B{b}-T{chosen}-T{rejected}-f{fraction}"
        yield Case("key_token_dpo_loss", name, _pair_case, (b, chosen, rejected, fraction))
        yield Case("top_fraction_weights", name, _fraction_case, (b, rejected, fraction))


def _random(device: torch.device, seed: int = 0) -> Callable[..., Tensor]:
    draw = torch.Generator(device).manual_seed(seed)
    return lambda *shape, dtype=FP32: torch.randn(*shape, generator=draw, device=device).to(dtype)


def _selected(device: torch.device, sizes: tuple[int, ...], kind: str) -> Positions:
    draw, parts = torch.Generator(device).manual_seed(1), []
    share = {"none": 0.0, "ends": 0.0, "5%": 0.05, "all": 1.1}[kind]
    for size in sizes:
        mask = torch.rand(size, generator=draw, device=device) < share
        if kind == "ends" and size:
            mask[0] = mask[-1] = True
        parts.append(Positions.pack(mask.nonzero().squeeze(1), size))
    return Positions.cat(parts)


def _gather_case(device, sizes, kind, dtype):
    random, parts = _random(device), _selected(device, sizes, kind).split()
    dense = [random(size, dtype=dtype) for size in sizes]
    before = [random(len(part)) for part in parts]

    def outputs(impl):
        found = {}
        for index, (weight, part, start) in enumerate(zip(dense, parts, before, strict=True)):
            total, squares = start.clone(), torch.empty((), device=device)
            gather(weight, part, out=total, accumulate=True, square_sum=squares, impl=impl)
            found |= {f"picked {index}": gather(weight, part, impl=impl), f"sum {index}": total}
            found |= {f"squares {index}": squares}
        return found

    truth = {
        f"squares {index}": (weight.view(-1)[part.unpack()].float() + start).double().square().sum()
        for index, (weight, part, start) in enumerate(zip(dense, parts, before, strict=True))
    }
    return outputs, truth


def _scatter_case(device, sizes, kind, dtype):
    random, positions = _random(device), _selected(device, sizes, kind)
    dense, values = [random(size, dtype=dtype) for size in sizes], random(len(positions))

    def outputs(impl):
        written, swapped = [weight.clone() for weight in dense], [weight.clone() for weight in dense]
        held = values.to(dtype, copy=True)
        scatter_(written, positions, values, impl=impl)
        swap_(swapped, positions, held, impl=impl)
        one = dense[0].clone()
        scatter_(one, positions.split()[0], values[: positions.counts[0]], impl=impl)
        swap_(one, positions.split()[0], values[: positions.counts[0]].to(dtype), impl=impl)
        return {"written": torch.cat(written), "swapped": torch.cat(swapped), "held": held, "one": one}

    return outputs, None


def _adamw_case(device, sizes, kind, grad_dtype, weight_dtype):
    positions, steps = _selected(device, sizes, kind), 3
    settings = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    random = _random(device)
    start, grads = random(len(positions)), [random(len(positions), dtype=grad_dtype) for _ in range(steps)]
    scale = torch.tensor(0.37, device=device)

    def outputs(impl):
        state, weights = _adamw_state(start, positions, weight_dtype or FP32)
        where = {"weight": weights, "positions": positions} if weight_dtype else {}
        for number, grad in enumerate(grads, 1):
            step = torch.tensor(float(number), device=device)
            masked_adamw_(*_with(state, grad), step=step, grad_scale=scale, impl=impl, **where, **settings)
        return state | ({"wrong in weight": _wrong(weights, positions, state["values"])} if weight_dtype else {})

    p, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for number, grad in enumerate(grads, 1):
        g = grad.double() * float(scale)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p * (1 - 3e-4) - 3e-3 * (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
    return outputs, {"values": p, "exp_avg": m, "exp_avg_sq": v}


def _adamw_state(start, positions, dtype):
    weights = [torch.zeros(size, dtype=dtype, device=start.device) for size in positions.sizes]
    zeros = {name: torch.zeros_like(start) for name in ("exp_avg", "exp_avg_sq")}
    return {"values": start.clone(), **zeros}, weights


def _wrong(weights, positions, values):
    """How many weights are not what they should be: zero where nothing is selected, else the rounded value."""
    wanted = [torch.zeros_like(weight) for weight in weights]
    scatter_(wanted, positions, values, impl="torch")
    return (torch.cat(weights) != torch.cat(wanted)).sum()


def _graph_case(device):
    """Two replays, each with another step and learning rate: a graph must read them from the device."""
    positions, random = _selected(device, (70_001, 3), "5%"), _random(device)
    start, grad = random(len(positions)), random(len(positions))
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}

    def outputs(impl):
        step, lr = torch.tensor(1.0, device=device), torch.tensor(1e-2, device=device)
        state, weights = _adamw_state(start, positions, BF16)
        where = {"weight": weights, "positions": positions}

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
        return state | {"wrong in weight": _wrong(weights, positions, state["values"])}

    exact = outputs("torch")
    return outputs, {name: exact[name].double() for name in ("values", "exp_avg", "exp_avg_sq")}


def _with(state, grad):
    return state["values"], grad, state["exp_avg"], state["exp_avg_sq"]


def _token_logps_case(device, n, d, v, softcap, temperature, bias, dtype, keep=4):
    random, draw = _random(device), torch.Generator().manual_seed(2)
    hidden, weight = random(n, d, dtype=dtype), (random(v, d) / d**0.5).to(dtype)
    bias = random(v, dtype=dtype) if bias else None
    targets = torch.randint(0, v, (n,), generator=draw)
    targets[:: keep or 1] = -100 if n > 1 else 0  # a quarter of the rows, or all
    targets = targets.to(device)
    upstream = random(n)
    upstream[1::5] = 0.0
    positions = _selected(device, (v * d,), "5%")

    def outputs(impl):
        leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in (hidden, weight, bias)]
        values = weight.view(-1)[positions.unpack()].float().requires_grad_()
        shared = {"bias": leaves[2], "softcap": softcap, "temperature": temperature, "impl": impl}
        logps = token_logps(leaves[0], leaves[1], targets, **shared)
        compact = token_logps(leaves[0].detach(), leaves[1], targets, values=values, positions=positions, **shared)
        asked = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad((logps * upstream).sum(), asked)
        picked = torch.autograd.grad((compact * upstream).sum(), values)[0]
        names = ("d_hidden", "d_weight", "d_bias")[: len(found)]
        return {"logps": logps, **dict(zip(names, found, strict=True)), "d_values": picked}

    leaves = [None if leaf is None else leaf.double().requires_grad_() for leaf in (hidden, weight, bias)]
    logits = F.linear(*leaves)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    chosen = (logits / temperature).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    logps = torch.where(targets != -100, chosen, 0.0)
    found = torch.autograd.grad((logps * upstream).sum(), [leaf for leaf in leaves if leaf is not None])
    truth = {"logps": logps, **dict(zip(("d_hidden", "d_weight", "d_bias"), found, strict=False))}
    return outputs, truth | {"d_values": truth["d_weight"].view(-1)[positions.unpack()]}


def _topk_case(device, size, k, dtype):
    random = _random(device)
    scale = 10.0 ** (random(size) * 3).clamp(-4, 4)
    scores = (random(size) * scale).to(dtype)
    scores[::10] = 0.0
    scores[1::3] = scores[min(1, size - 1)].clone()  # many ties
    chunks = [scores[: size // 3], scores[size // 3 : size // 3 + 1], scores[size // 3 + 1 :]]

    def outputs(impl):
        if impl == "triton":
            value, above, ties = topk_threshold(chunks, k, impl=impl)
        else:
            ranked = scores.float().abs().sort(descending=True).values
            value, above, ties = ranked[k - 1], (ranked > ranked[k - 1]).sum(), (ranked == ranked[k - 1]).sum()
        return {"value": value.cpu(), "above": torch.tensor(int(above)), "ties": torch.tensor(int(ties))}

    return outputs, None


def _pair_case(device, rows, chosen_length, rejected_length, fraction):
    random = _random(device)
    lengths = (chosen_length, rejected_length)
    policy, ref = ([-random(rows, length).abs() for length in lengths] for _ in range(2))
    policy[1][:, ::3], ref[1][:, ::3] = -1.5, -1.0  # ties
    policy[1][-1] = ref[1][-1]  # a pair that nothing has moved yet
    valid = [random(rows, length) < 0.8 for length in lengths]
    valid[1][0] = False
    upstream = random(rows)

    def outputs(impl):
        leaves = [logps.clone().requires_grad_() for logps in policy]
        settings = {"fraction": fraction, "beta": 0.3, "label_smoothing": 0.1, "impl": impl}
        losses, *rest = key_token_dpo_loss(*leaves, *ref, *valid, **settings)
        found = torch.autograd.grad((losses * upstream).sum(), leaves)
        names = ("losses", "chosen_rewards", "rejected_rewards", "key_weights", "d_chosen", "d_rejected")
        return dict(zip(names, (losses, *rest, *found), strict=True))

    leaves = [logps.double().requires_grad_() for logps in policy]
    weights = key_token_weights(policy[1] - ref[1], valid[1], fraction)
    chosen = 0.3 * ((leaves[0] - ref[0]) * valid[0]).sum(1)
    rejected = 0.3 * ((leaves[1] - ref[1]) * weights).sum(1)
    losses = -0.9 * F.logsigmoid(chosen - rejected) - 0.1 * F.logsigmoid(rejected - chosen)
    d_chosen, d_rejected = torch.autograd.grad((losses * upstream).sum(), leaves)
    truth = {"losses": losses, "chosen_rewards": chosen, "rejected_rewards": rejected}
    return outputs, truth | {"d_chosen": d_chosen, "d_rejected": d_rejected}


def _fraction_case(device, rows, length, fraction):
    random = _random(device)
    scores, valid = random(rows, length), random(rows, length) < 0.8
    scores[:, ::3] = 0.5
    scores[:, 1::7], scores[:, 2::7] = -0.0, 0.0  # at fraction 0.65 the last one kept is a zero
    return lambda impl: {"weights": top_fraction_weights(scores, valid, fraction, impl=impl)}, None
