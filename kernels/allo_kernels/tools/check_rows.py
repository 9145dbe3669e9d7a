"""Cases of what works row by row or over a stream: thresholds, the loss on key tokens."""

import itertools
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from allo_kernels import key_token_dpo_loss, key_token_weights, topk_threshold
from allo_kernels.tools.check import BF16, FP16, FP32, NAMES, Case, Exact, drawing


def topk_cases(large: bool) -> Iterator[Case]:
    for size, dtype in itertools.product((1, 5000) + ((1 << 26,) if large else ()), (FP32, BF16, FP16)):
        for k in sorted({1, size // 20, size} - {0}):
            name = f"P{size}-k{k}-{NAMES[dtype]}"
            yield Case("topk_threshold", name, _topk_case, (size, k, dtype))


def pair_cases(large: bool) -> Iterator[Case]:
    shapes = ((1, 1, 1), (3, 7, 50), (3, 70, 2100)) + (((64, 512, 5000),) if large else ())
    for (b, chosen, rejected), fraction in itertools.product(shapes, (0.0, 0.1, 0.4, 0.65, 1.0)):
        name = f"B{b}-T{chosen}-T{rejected}-f{fraction}"
        yield Case("key_token_dpo_loss", name, _pair_case, (b, chosen, rejected, fraction))


def _topk_case(device, size, k, dtype):
    random = drawing(device)
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

    return outputs, {}


def _pair_case(device, rows, chosen_length, rejected_length, fraction):
    random = drawing(device)
    lengths = (chosen_length, rejected_length)
    policy, ref = ([-random(rows, length).abs() for length in lengths] for _ in range(2))
    policy[1][:, ::3], ref[1][:, ::3] = -1.5, -1.0  # ties
    for start, zero in ((1, -0.0), (2, 0.0)):  # at fraction 0.65 the last key token's log-ratio is one of these
        policy[1][:, start::7], ref[1][:, start::7] = zero, 0.0
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
    exponent = float((chosen.abs() + rejected.abs()).detach().max())
    of_margin = {"losses": losses, "d_chosen": d_chosen, "d_rejected": d_rejected}
    truth = {"chosen_rewards": Exact(chosen), "rejected_rewards": Exact(rejected)}
    return outputs, truth | {name: Exact(tensor, exponent) for name, tensor in of_margin.items()}
