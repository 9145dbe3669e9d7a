"""What the engine relies on, tried on the model itself: a few tokens go through it about ten times.

    the same tokens give the same finite bits        else refused: broken, or noise is not switched off
    a later token changes nothing before it          else refused: not causal
    the head is linear, then soft-capped and scaled  else refused: token_logps computes no other
    padding and neighbours do not matter to a row    else rows run one at a time
    responses of one row can be kept apart           else one response a row, its prompt repeated
    problems of one row can be kept apart            else a row each, padded

What a few tokens cannot show is asked of the configuration: attention windows that are long, and rotary embeddings that
change with the longest row.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from allo_fast.config import UserError
from allo_fast.data.batch import Batch, Layout, collate
from allo_fast.data.corpus import Corpus
from allo_fast.errors import first_line
from allo_fast.model.attention import PACKED
from allo_fast.model.weights import is_sharded

LONGEST = 256  # tokens of a trial's prompt; attention windows beyond are not tried
# Keys under which configurations say how far layers see that do not see everything.
WINDOWS = ("sliding_window", "attention_window_size", "window_size", "local_attention", "attention_chunk_size")


@dataclass(frozen=True)
class Findings:
    """How a model is computed."""

    together: int | None  # rows up to this width run in one pass, wider ones one at a time; None: any width
    layout: Layout  # what may share a row
    notes: tuple[str, ...]  # what of this costs speed, and why
    softcap: float | None  # of the head
    temperature: float


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """What gives the head its hidden states. Raises UserError where the model has no such part."""
    if model.base_model is not model:
        return model.base_model
    parts = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(parts) != 1:
        raise UserError(f"{type(model).__name__}: it is not made of a decoder and a head")
    return parts[0]


@torch.no_grad()
def examine(
    model: PreTrainedModel, hidden: Callable[[Batch], Tensor], head: Callable, packs: Layout | None
) -> Findings:
    """Raises UserError, naming the model's class, where it is refused.

    hidden: a batch's last hidden states [B, T, D], its rows in one pass. head: hidden [N, D], targets [N] ->
    log-probabilities [N] fp32 by the model's head without cap and scale. packs: how its attention may take packed
    rows, if at all.
    """
    name, trial = type(model).__name__, _Trial(model, hidden)
    weights = [weight._version for weight in model.parameters()]
    try:
        alone = [hidden(row) for row in trial.rows]
    except Exception as error:  # a model may raise anything
        raise UserError(f"{name}: it cannot compute a row of tokens: {said_by(error)}") from error
    row, states = trial.rows[1], alone[1]
    if weights != [weight._version for weight in model.parameters()]:
        raise UserError(f"{name}: it changes its own weights while it computes")
    if not states.isfinite().all():
        raise UserError(f"{name}: what it computes from a row of tokens is not finite")
    if not torch.equal(states, hidden(row)):
        raise UserError(f"{name}: the same tokens give other results each time; model.eval() switches noise off")
    later = torch.arange(states.shape[1], device=states.device)[None] >= states.shape[1] - 3
    if trial.reaches(row, states, later, ~later):
        raise UserError(f"{name}: it is not causal, a later token changes the probabilities of earlier ones")
    single = _why_single(trial, alone)
    softcap, temperature = _shape_of_head(model, row, states, head)
    limit = None if single is None else 0
    if single is None and (limit := longest_row(model)):
        single = f"its rotary embedding changes with the longest row beyond {limit} tokens"
    why_apart = single or _why_apart(model, trial, alone)
    notes = [f"{name}: rows run one at a time: {single}"] if single else []
    notes += [f"{name}: one response per row, prompts repeated: {why_apart}"] if why_apart and not single else []
    layout = Layout(why_apart is None)
    if packs and limit is None and packs.share_prompts == layout.share_prompts:
        why_padded = _why_padded(trial, alone, packs)
        notes += [f"{name}: rows are padded: {why_padded}"] if why_padded else []
        layout = layout if why_padded else packs
    return Findings(limit, layout, tuple(notes), softcap, temperature)


class _Trial:
    """One prompt and two responses: as `rows` of their own, side by side in `batch`, and in one row, `shared`."""

    def __init__(self, model: PreTrainedModel, hidden: Callable[[Batch], Tensor]):
        self.model, self.hidden, self.tolerance = model, hidden, _tolerance(model)
        config = model.config.get_text_config()
        self.low, self.high = min(10, config.vocab_size // 3), min(1000, config.vocab_size)
        draw = torch.Generator().manual_seed(0)
        lengths = (_prompt_length(config), 5, 8)
        prompt, *responses = (torch.randint(self.low, self.high, (n,), generator=draw).tolist() for n in lengths)
        corpus = Corpus()
        pair = tuple(corpus.add(prompt, responses))
        self.corpus, self.pairs = corpus, [tuple(corpus.add(prompt[::-1], responses[::-1])), pair]
        self.rows = [collate(corpus, [(index,)]).to(model.device) for index in pair]
        self.batch = collate(corpus, [pair], Layout(share_prompts=False)).to(model.device)
        self.shared = collate(corpus, [pair]).to(model.device)

    def other_tokens(self, batch: Batch, where: Tensor) -> Batch:
        other = (batch.input_ids - self.low + 1) % (self.high - self.low) + self.low
        return replace(batch, input_ids=torch.where(where, other, batch.input_ids))

    def reaches(self, batch: Batch, before: Tensor, sources: Tensor, readers: Tensor) -> bool:
        """Whether tokens at `sources` change the hidden states at `readers`, which are `before` in this batch.

        What is masked out weighs exactly zero, so not one bit may change. Experts multiply all their tokens at once and
        may round otherwise when there are more of them; then the gradient, which is exactly zero, decides.
        """
        after = self.hidden(self.other_tokens(batch, sources))
        if torch.equal(before[readers], after[readers]):
            return False
        if not _near(before[readers], after[readers], self.tolerance):
            return True
        return not is_sharded(self.model) and bool(self._gradient(batch, readers)[sources].any())

    @torch.enable_grad()
    def _gradient(self, batch: Batch, readers: Tensor) -> Tensor:
        """Of the hidden states at `readers` in the embeddings of all tokens [B, T, D]."""
        leaves: list[Tensor] = []

        def cut(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[0]

        with self.model.get_input_embeddings().register_forward_hook(cut):
            states = self.hidden(batch)[readers]
        upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
        return torch.autograd.grad(states, leaves[0], upstream)[0]


def _why_single(trial: _Trial, alone: list[Tensor]) -> str | None:
    """Why rows must run one at a time; None where they need not."""
    try:
        together = trial.hidden(trial.batch)
    except Exception as error:  # a model may raise anything
        return f"it cannot compute padded rows: {said_by(error)}"
    for row, states, batch in zip(together, alone, trial.rows, strict=True):
        response = batch.segment_ids[0] == 1
        if not _near(row[: states.shape[1]][response], states[0, response], trial.tolerance):
            return "padding or other rows change its results"
    return None


def _why_apart(model: PreTrainedModel, trial: _Trial, alone: list[Tensor]) -> str | None:
    """Why responses of this model cannot share a row; None when they can."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager", PACKED):
        return f"{config._attn_implementation} takes no mask of responses"
    if reads_a_part(config):
        return "it has layers that do not attend to everything"
    if "position_ids" not in inspect.signature(decoder_of(model).forward).parameters:
        return "it takes no position_ids"
    first, second = trial.shared.segment_ids == 1, trial.shared.segment_ids == 2
    moved = replace(trial.shared, position_ids=trial.shared.position_ids + second)
    try:
        before, elsewhere = trial.hidden(trial.shared), trial.hidden(moved)
        reached = trial.reaches(trial.shared, before, first, second)
    except Exception as error:  # a model may raise anything
        return f"it takes no mask of responses: {said_by(error)}"
    if reached:
        return "responses in one row can change each other"
    if torch.equal(before[second], elsewhere[second]):
        return "it ignores position_ids"
    responses = [states[batch.segment_ids == 1] for states, batch in zip(alone, trial.rows, strict=True)]
    if not _near(torch.cat([before[first], before[second]]), torch.cat(responses), trial.tolerance):
        return "its position_ids are not the positions of a row of its own"
    return None


def _why_padded(trial: _Trial, alone: list[Tensor], layout: Layout) -> str | None:
    """Why problems of this model cannot lie in one row; None when they can."""
    batch = collate(trial.corpus, trial.pairs, layout).to(trial.model.device)
    spans = batch.spans[len(batch.spans) // 2 :]  # of the second of two problems
    place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]
    others, later = place < spans[0].begin, (place >= spans[0].begin) & (place < spans[-1].end)
    try:
        before = trial.hidden(batch)
        reached = trial.reaches(batch, before, others, later)
    except Exception as error:  # a model may raise anything
        return f"it takes no packed rows: {said_by(error)}"
    if reached:
        return "problems in one row can change each other"
    packed = before[later & (batch.segment_ids > 0)]
    responses = [states[row.segment_ids == 1] for states, row in zip(alone, trial.rows, strict=True)]
    return None if _near(packed, torch.cat(responses), trial.tolerance) else "in one row its results are others"


def _shape_of_head(model: PreTrainedModel, row: Batch, decoded: Tensor, head: Callable) -> tuple[float | None, float]:
    """Its soft cap, None without one, and its temperature: read off what follows from known outputs of its linear
    layer, because configurations name them differently, or name what the model does not compute."""
    source, io = model.get_output_embeddings(), []

    def know(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        io[:] = inputs[0], output
        return _known_logits(output)

    refusal = UserError(f"{type(model).__name__}: its head is not linear, at most soft-capped and scaled")
    if not isinstance(source, nn.Module):
        raise refusal
    with source.register_forward_hook(know):
        logits = model(input_ids=row.input_ids, use_cache=False).logits
    if not io or io[0].shape != decoded.shape or logits.shape != io[1].shape:
        raise refusal
    softcap, temperature = _cap_and_scale(logits.float())
    known, tolerance = _known_logits(logits), _tolerance(model)
    expected = (softcap * torch.tanh(known / softcap) if softcap else known) / temperature
    as_known = torch.allclose(logits.float(), expected, rtol=max(1e-5, 4 * torch.finfo(logits.dtype).eps))
    linear = head(decoded.flatten(0, 1)[row.sources], row.targets)
    by_model = io[1].float().log_softmax(-1).flatten(0, 1)[row.sources, row.targets]
    differs = (linear - by_model).abs().max() > tolerance * io[1].float().abs().max().clamp(min=1)
    if not temperature > 0 or not as_known or differs or not _near(decoded, io[0], tolerance):
        raise refusal
    return softcap, temperature


def _known_logits(like: Tensor) -> Tensor:
    """fp32, for every token 2**-10 .. 2**10 in both signs: below any cap, and far above."""
    powers = torch.linspace(-10, 10, like.shape[-1], device=like.device).exp2()
    powers[1::2] *= -1
    return powers.expand(like.shape)


def _cap_and_scale(logits: Tensor) -> tuple[float | None, float]:
    """Of what a head made of known logits."""
    inputs, outputs = _known_logits(logits)[0, 0], logits[0, 0]
    temperature = float(inputs[0] / outputs[0])
    cap = float(outputs[-1].abs()) * temperature
    return (cap if cap < 0.99 * float(inputs[-1].abs()) else None), temperature


def longest_row(model: nn.Module) -> int | None:
    """Of how many tokens a row may be that has the same rotary embedding whatever rows lie beside it; None: any."""
    limits = []
    for module in growing_embeddings(model):
        nested = isinstance(module.rope_type, dict)
        each = module.config.rope_parameters.values() if nested else [module.config.rope_parameters]
        trained = [settings.get("original_max_position_embeddings") for settings in each]
        limits += [module.original_max_seq_len, *filter(None, trained)]
    return min(limits, default=None)


def growing_embeddings(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings whose frequencies follow from the largest position of a batch."""

    def kinds(module: nn.Module) -> list[str]:
        kind = getattr(module, "rope_type", None) or ""
        return list(kind.values()) if isinstance(kind, dict) else [kind]

    return [m for m in model.modules() if any("dynamic" in kind or kind == "longrope" for kind in kinds(m))]


def _prompt_length(config: PretrainedConfig) -> int:
    """Of a prompt that reaches beyond every attention window that is short enough to be tried."""
    room = min(LONGEST, (getattr(config, "max_position_embeddings", None) or LONGEST) - 8)
    return max([3, *(window + 1 for window in _windows(config) if window < room)])


def reads_a_part(config: PretrainedConfig) -> bool:
    """Whether a layer attends to some of the tokens before a token only."""
    layers = getattr(config, "layer_types", None)
    return set(layers) != {"full_attention"} if layers else bool(_windows(config))


def _windows(config: PretrainedConfig) -> list[int]:
    return [size for key in WINDOWS if isinstance(size := getattr(config, key, None), int) and size > 0]


def _tolerance(model: PreTrainedModel) -> float:
    """Half the digits: in another shape a product differs in the last ones, a fault in the first."""
    return torch.finfo(model.dtype).eps ** 0.5


def _near(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Of hidden states [..., D], at most places: rounding can send a token to another expert, at few."""
    distances = (actual.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return bool(distances.median() <= tolerance)


def said_by(error: Exception) -> str:
    """What a model's own code raised, in one line; that memory ran out says nothing of the model, and is raised on."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        raise error
    name, said = type(error).__name__, first_line(error)
    return name if said == name else f"{name}: {said}"
