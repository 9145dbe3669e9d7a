"""Whether allo-fast computes what transformers does, one architecture after the other, with tiny random models.

Log-probabilities of responses and the gradients of a random selection of weights, from one batch of rows of unlike
lengths, against the plain model: one sequence at a time, all logits, autograd. In float32, under sdpa and eager
attention where the model has both.

Both sides do the same sums in other orders. A log-probability inherits the rounding of logits of up to LARGEST_LOGIT,
and each of some two hundred roundings on the way to one adds at most eps: 200 eps LARGEST_LOGIT = 7e-4 bounds honest
differences. Gradients are held to the same bound, relative to the largest of their tensor, or to a thousandth of the
model's largest where that is more.
"""

import copy
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from allo_fast.config import UserError
from allo_fast.data.batch import collate
from allo_fast.data.corpus import Corpus
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.weights import fingerprint, named_weights

CASES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())["architectures"]
ATTENTION = ("sdpa", "eager")
# Tokens of each prompt and its responses: shorter and longer than the windows and limits in the configurations.
LENGTHS = ((5, 7, 3), (9, 2, 11), (1, 6, 1), (20, 12, 9))
LARGEST_LOGIT = 30
TOLERANCE = 200 * torch.finfo(torch.float32).eps * LARGEST_LOGIT


@dataclass(frozen=True)
class Row:
    architecture: str
    attention: str
    runs: str  # how rows are computed, or that the model is refused
    logps_error: float | None  # the largest difference of a log-probability
    gradient_error: float | None  # the largest relative difference of a selected weight's gradient
    refused: str  # why, in the words that a user reads

    @property
    def agrees(self) -> bool:
        return bool(self.refused) or max(self.logps_error, self.gradient_error) <= TOLERANCE


def run(names: list[str] | None = None, path: Path | None = None, attentions: tuple[str, ...] = ATTENTION) -> list[Row]:
    """Prints and returns a row for each architecture and attention. Raises UserError for an unknown name."""
    if unknown := sorted(set(names or ()) - CASES.keys()):
        raise UserError(f"{unknown[0]}: no such architecture; there are {', '.join(CASES)}")
    transformers.logging.set_verbosity_error()
    logging.getLogger("allo_fast").setLevel(logging.ERROR)  # how rows are computed is a column here
    rows = []
    print(f"{'architecture':<24}{'attention':<11}{'runs':<17}{'logps_error':>12}{'gradient_error':>15}")
    for name in names or CASES:
        for attention in attentions:
            if (row := compare(name, attention)) not in rows:
                rows.append(row)
                print(_line(row), flush=True)
    wrong = [row for row in rows if not row.agrees]
    refused = sum(bool(row.refused) for row in rows)
    print(f"{len(rows)} rows, {refused} refused, {len(wrong)} differ by more than {TOLERANCE:.1e}")
    if path:
        found = {"transformers": transformers.__version__, "torch": torch.__version__, "tolerance": TOLERANCE}
        path.write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return rows


def _line(row: Row) -> str:
    start = f"{row.architecture:<24}{row.attention:<11}{row.runs:<17}"
    if row.refused:
        return start + row.refused
    return f"{start}{row.logps_error:>12.1e}{row.gradient_error:>15.1e}" + ("" if row.agrees else "  DIFFERS")


def compare(name: str, attention: str) -> Row:
    model = build(name, attention)
    used, plain = model.config.get_text_config()._attn_implementation, copy.deepcopy(model)
    try:
        policy = SparsePolicy(model, _random_selection(model))
    except UserError as error:
        return Row(name, used, "refused", None, None, str(error))
    corpus = _problems(model.config.get_text_config().vocab_size)
    batch = collate(corpus, corpus.examples, policy.logps.layout)
    upstream = torch.randn(batch.valid.shape, generator=torch.Generator().manual_seed(2))
    logps = policy.response_logps(batch)
    (logps * upstream).sum().backward()
    logps = logps.detach()
    expected, gradients = _plainly(plain, corpus, batch.responses.tolist(), upstream)
    logps_error = max((ours[: len(theirs)] - theirs).abs().max() for ours, theirs in zip(logps, expected, strict=True))
    return Row(name, used, _runs(policy), float(logps_error), _gradient_error(policy, gradients), "")


def build(name: str, attention: str) -> PreTrainedModel:
    """A random model whose logits, and attention scores, are as large as a trained one's; in a model that has no such
    attention, with its own."""
    settings = {key: value for key, value in CASES[name].items() if key != "config"}
    config = getattr(transformers, f"{CASES[name]['config']}Config")
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config(**settings), attn_implementation=attention)
    except ValueError:
        model = AutoModelForCausalLM.from_config(config(**settings))
    head = model.get_output_embeddings().weight
    head.data *= 8
    for weight_name, weight in model.named_parameters():
        if weight is not head and any(part in weight_name for part in ("q_proj", "k_proj", "qkv", "query", "c_attn")):
            weight.data *= 4
    return model.eval()


def _runs(policy: SparsePolicy) -> str:
    found = policy.logps.findings
    if found.together is None:
        return "shares rows" if found.layout.share_prompts else "own rows"
    return f"one row > {found.together}" if found.together else "one row"


def _problems(vocabulary: int) -> Corpus:
    draw = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=draw).tolist()

    corpus = Corpus()
    for prompt, *responses in LENGTHS:
        corpus.examples.append(tuple(corpus.add(tokens(prompt), [tokens(count) for count in responses])))
    return corpus


def _random_selection(model: PreTrainedModel, ratio: float = 0.1) -> Selection:
    draw = torch.Generator().manual_seed(1)
    scores = {name: torch.rand(weight.shape, generator=draw) for name, weight in named_weights(model).items()}
    return Selection.from_scores(scores, ratio, base=fingerprint(model))


def _plainly(
    model: PreTrainedModel, corpus: Corpus, responses: list[int], upstream: Tensor
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probabilities of each response [its tokens], and what a loss of `upstream` times them sends every weight."""
    logps, gradients = [], {name: torch.zeros_like(weight) for name, weight in named_weights(model).items()}
    for line, index in enumerate(responses):
        fresh = copy.deepcopy(model)  # some remember the longest sequence
        tokens, prompt = corpus.responses[index].tokens, corpus.prompts[corpus.responses[index].prompt]
        logits = fresh(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0].float()
        ours = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        (ours * upstream[line, : len(tokens)]).sum().backward()
        logps.append(ours.detach())
        for name, weight in named_weights(fresh).items():
            gradients[name] += 0 if weight.grad is None else weight.grad
    return logps, gradients


def _gradient_error(policy: SparsePolicy, gradients: dict[str, Tensor]) -> float:
    floor = max(float(gradient.abs().max()) for gradient in gradients.values()) / 1000
    errors = []
    for name, value in policy.values.items():
        theirs = gradients[name].view(-1)[policy.positions[name].unpack()]
        ours = torch.zeros_like(theirs) if value.grad is None else value.grad
        errors.append(float((ours - theirs).abs().max()) / max(floor, float(gradients[name].abs().max())))
    return max(errors)
