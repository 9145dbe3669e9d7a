"""Scores of weights from gradients at the frozen base, against definitions in float64 and for any number of windows."""

import pytest
import torch
from conftest import pair_corpus, tiny_llama

from allo_fast.config import GRADIENT_SCORES, TrainConfig, UserError
from allo_fast.locating.files import stored_scores
from allo_fast.locating.sweep import Sweep
from allo_fast.locating.windows import pieces_of, windows_of
from allo_fast.method.objectives import Dpo, Npo
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import named_weights
from allo_fast.training.backend import learning_rates
from allo_fast.training.examples import Examples

SETTINGS = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
TRAIN = TrainConfig(**SETTINGS, num_train_epochs=2, warmup_steps=1, max_grad_norm=0.5, weight_decay=0.1)


def swept(folder, score="linear", model=None, objective=None, examples=None, **settings):
    """A finished sweep over the tiny pairs."""
    model = model or tiny_llama(tie_word_embeddings=True)
    examples = examples or Examples(pair_corpus(), TRAIN)
    sweep = Sweep(ResponseLogps(model), examples, objective or Dpo(0.5), TRAIN, score, folder, **settings)
    done, total = [*sweep.run()][-1]
    assert done == total
    return sweep


def scores_of(sweep):
    sizes = {name: weight.numel() for name, weight in named_weights(sweep.model).items()}
    return {name: score.part(0, score.size) for name, score in stored_scores(sweep.folder, sizes).items()}


def plain_gradients(model, examples):
    """Of each step, by transformers' own logits in float64: the DPO gradient where policy and reference are equal."""
    corpus, weights = examples.corpus, named_weights(model)

    def logp(index):
        tokens, prompt = corpus.responses[index].tokens, corpus.prompts[corpus.responses[index].prompt]
        logits = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        return logits[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).sum()

    for step in examples.steps:
        model.zero_grad()
        pairs = [pair for micro in step for pair in examples.micro_batches[micro]]
        for chosen, rejected in pairs:
            margin = 0.5 * (logp(chosen) - logp(rejected))
            (-torch.nn.functional.logsigmoid(margin - margin.detach()) / len(pairs)).backward()
        yield {name: weight.grad.clone() for name, weight in weights.items()}


@pytest.fixture(scope="module")
def gradients():
    return list(plain_gradients(tiny_llama(tie_word_embeddings=True).double(), Examples(pair_corpus(), TRAIN)))


def test_linear_is_adamw_whose_weights_are_put_back_after_every_step(tmp_path, gradients):
    model, rates = tiny_llama(tie_word_embeddings=True).double(), learning_rates(TRAIN, len(gradients))
    weights = named_weights(model)
    base = {name: weight.detach().clone() for name, weight in weights.items()}
    moved = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=TRAIN.weight_decay)
    for rate, gradient in zip(rates, gradients, strict=True):
        for name, weight in weights.items():
            weight.grad = gradient[name].clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                moved[name] += weight - base[name]
                weight.copy_(base[name])
    largest = max(float(change.abs().max()) for change in moved.values())
    for name, score in scores_of(swept(tmp_path)).items():
        assert (score.double() - moved[name].abs().view(-1)).abs().max() < 1e-4 * largest, name


def test_the_other_scores_are_their_definitions(tmp_path, gradients):
    for score in ("snr", "grad_sum", "fisher"):
        for name, found in scores_of(swept(tmp_path / score, score)).items():
            steps = torch.stack([gradient[name].view(-1) for gradient in gradients])
            squares = (steps**2).sum(0)
            truth = {"grad_sum": steps.sum(0).abs(), "fisher": squares, "snr": steps.sum(0).abs() / squares.sqrt()}
            expected = truth[score].nan_to_num().float()
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.max()))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_windows_show_in_no_bit(tmp_path, score, tied):
    def scores(windows, **settings):
        folder = tmp_path / "-".join([str(windows), *settings])
        sweep = swept(folder, score, tiny_llama(tie_word_embeddings=tied), windows=windows, **settings)
        assert len(sweep.windows) <= windows and sweep.segments is None or windows > 1
        return scores_of(sweep), sweep

    whole, one = scores(1)
    for windows in (2, 7, len(one.pieces)):
        parts, sweep = scores(windows)
        assert all(torch.equal(whole[name], parts[name]) for name in whole), windows
        largest = max(sum(piece.size for piece in window) for window in sweep.windows)
        assert sweep.state_bytes["accumulators"] == 4 * (1 + sweep.family.states) * largest
    parts, _ = scores(3, host=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_clipping_counts(tmp_path):
    clipped, free = scores_of(swept(tmp_path / "a")), scores_of(swept(tmp_path / "b", clip=False))
    assert any(not torch.equal(clipped[name], free[name]) for name in clipped)


def test_the_model_is_as_before(tmp_path):
    model = tiny_llama()
    before = {module: (type(module), *vars(module)) for module in model.modules()}
    swept(tmp_path, model=model, windows=5)
    after = {module: (type(module), *vars(module)) for module in model.modules()}
    assert after == before and all(weight.grad is None for weight in model.parameters())


def test_a_killed_sweep_goes_on_with_the_next_pass(tmp_path):
    whole = scores_of(swept(tmp_path / "whole", windows=4))
    examples = Examples(pair_corpus(), TRAIN)
    for steps in (1, 13, 30):
        folder = tmp_path / str(steps)
        logps = ResponseLogps(tiny_llama(tie_word_embeddings=True))
        first = Sweep(logps, examples, Dpo(0.5), TRAIN, "linear", folder, windows=4)
        for _, _ in zip(range(steps), first.run(), strict=False):
            pass
        written = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
        # Other windows than the first session's would make its files useless.
        again = swept(folder, windows=2) if any("score" in path.name for path in written) else swept(folder, windows=4)
        assert all(path.stat().st_mtime_ns == when for path, when in written.items())
        assert all(torch.equal(whole[name], score) for name, score in scores_of(again).items())


def test_pieces_cover_every_weight_once_and_windows_are_even():
    model = tiny_llama(tie_word_embeddings=True)
    pieces = pieces_of(model)
    for name, weight in named_weights(model).items():
        ends = [(piece.begin, piece.end) for piece in pieces if piece.name == name]
        assert ends[0][0] == 0 and ends[-1][1] == weight.numel()
        assert all(end == begin for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))
    windows = windows_of(pieces, 4)
    assert [piece for window in windows for piece in window] == pieces and len(windows) == 4
    largest, total = max(sum(piece.size for piece in window) for window in windows), sum(p.size for p in pieces)
    assert largest <= total / 4 + max(piece.size for piece in pieces)
    with pytest.raises(UserError, match=f"locate.windows: expected 1..{len(pieces)}, .*; got {len(pieces) + 1}"):
        windows_of(pieces, len(pieces) + 1)


def test_gradients_that_cannot_rank_are_refused(tmp_path):
    class Broken(Dpo):
        def __call__(self, *given):
            loss, metrics = super().__call__(*given)
            return loss * float("inf"), metrics

    with pytest.raises(UserError, match="locate.score: linear: the gradient of .* is not finite"):
        swept(tmp_path / "a", objective=Broken(0.5))
    weights = [[0.0] * len(response.tokens) for response in pair_corpus().responses]
    corpus = pair_corpus()
    corpus.examples = [(index,) for index in range(len(corpus.responses))]
    none = Examples(corpus, TRAIN, token_weights=weights)
    with pytest.raises(UserError, match="every gradient is zero"):
        scores_of(swept(tmp_path / "b", "grad_sum", objective=Npo(0.1), examples=none))
