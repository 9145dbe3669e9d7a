"""Scores of weights from gradients at the frozen base, against plain float64, and however they are made."""

from itertools import chain
from operator import itemgetter

import pytest
import torch
from conftest import pair_corpus, tiny_llama
from sweeps import displacement, few, make_sweep, same, scores_of, settings, step_gradients, swept

from allo_fast.config import GRADIENT_SCORES, UserError
from allo_fast.data.arrays import Ragged
from allo_fast.locating.families import FAMILIES
from allo_fast.locating.taps import Taps
from allo_fast.locating.windows import Piece, pieces_of, windows_of
from allo_fast.method.alias import Alias
from allo_fast.method.objectives import Npo, Preference, Sft
from allo_fast.model.weights import named_weights
from allo_kernels import memory


def test_every_score_that_the_configuration_knows_is_made():
    assert tuple(FAMILIES) == GRADIENT_SCORES


@pytest.mark.parametrize("tied, clip, decay", [(False, True, 0.0), (True, True, 0.1), (True, False, 0.0)])
def test_linear_is_what_adamw_adds_up_to_when_weights_are_put_back(tmp_path, tied, clip, decay):
    ours = swept(
        tiny_llama(tie_word_embeddings=tied), tmp_path, windows=3, clip=clip, config=settings(weight_decay=decay)
    )
    expected = displacement(tied, clip, decay)
    assert ours.keys() == expected.keys()
    # Adam turns a gradient's rounding into a fraction of the rates' sum, 3e-3, where the gradient is nearly zero.
    errors = torch.cat([ours[name].double() - moved.abs() for name, moved in expected.items()]).abs()
    assert errors.mean() < 1e-9 and errors.max() < 1e-6


@pytest.mark.parametrize("score", ["snr", "grad_sum", "fisher"])
def test_other_scores_are_what_their_definitions_say(tmp_path, score):
    gradients = {name: torch.stack([step[name].view(-1) for step in step_gradients(False)]) for name in step_names()}
    definitions = {
        "snr": lambda g: (g.sum(0).abs() / g.square().sum(0).sqrt()).nan_to_num(0.0),
        "grad_sum": lambda g: g.sum(0).abs(),
        "fisher": lambda g: g.square().sum(0),
    }
    ours = swept(tiny_llama(), tmp_path, score, windows=3)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name].double(), definitions[score](gradient), rtol=1e-3, atol=1e-6)


def step_names() -> list[str]:
    return list(step_gradients(False)[0])


def recomputing(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():  # as `load_model` leaves it
        module.training = getattr(module, "gradient_checkpointing", False)
    return model


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_number_of_windows_shows_in_no_bit(tmp_path, caplog, recompute, tied, clip):
    def build():
        model = tiny_llama(tie_word_embeddings=tied, num_hidden_layers=3)
        return recomputing(model) if recompute else model

    whole = scores_of(few(build(), tmp_path / "1", clip=clip))
    for count in (2, 7):
        sweep = few(build(), tmp_path / str(count), windows=count, clip=clip, host=count == 2)
        assert same(scores_of(sweep), whole), f"{count} windows"
        assert len(sweep.windows) == count and sweep.passes == count + clip * -(-count // 4)
    assert "every pass runs the whole model" not in caplog.text


def test_as_many_windows_as_pieces(tmp_path):
    whole = scores_of(few(tiny_llama(), tmp_path / "1"))
    sweep = few(tiny_llama(), tmp_path / "all", windows=(count := len(pieces_of(tiny_llama()))))
    assert same(scores_of(sweep), whole)
    assert 128 < len(sweep.windows) <= count, "windows are as large as the largest piece"


def test_a_tensor_may_lie_in_several_windows(tmp_path):
    sweep = few(tiny_llama(), tmp_path, "grad_sum", windows=16)
    places = {name: {n for n, window in enumerate(sweep.windows) for p in window if p.name == name} for name in names()}
    assert max(map(len, places.values())) > 1
    whole = scores_of(few(tiny_llama(), tmp_path / "1", "grad_sum"))
    assert same(scores_of(sweep), whole)


def names() -> list[str]:
    return list(named_weights(tiny_llama()))


ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}


def test_scores_do_not_depend_on_how_a_step_is_cut(tmp_path):
    whole, cut = (settings(num_train_epochs=1, **how) for how in ({}, ONE_BY_ONE))
    whole, other = (swept(tiny_llama(), tmp_path / name, config=c) for name, c in (("a", whole), ("b", cut)))
    for name, score in whole.items():
        assert (other[name] - score).abs().mean() < 1e-8, name


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_bytes_are_those_of_live_tensors(tmp_path, score):
    sweep = few(tiny_llama(), tmp_path, score, windows=3)
    before = memory.live_bytes()
    running = sweep.run()
    live = next(memory.live_bytes() - before for done, total in running if done == total)
    list(running)
    states = {"linear": 3, "snr": 2, "grad_sum": 1, "fisher": 1}[score]
    *_, last = sizes = [sum(piece.size for piece in window) for window in sweep.windows]
    assert live == pytest.approx(4 * (1 + states) * last, rel=0.02)
    assert sweep.state_bytes["accumulators"] == 4 * (1 + states) * max(sizes)
    weights = sum(weight.numel() for weight in tiny_llama().parameters())
    assert max(sizes) <= weights / 3 + max(piece.size for piece in sweep.pieces)
    assert sweep.state_bytes["base"] == 4 * weights


def test_windows_are_as_even_as_pieces_allow():
    pieces = [Piece("a", begin, begin + size) for begin, size in ((0, 5), (5, 1), (6, 1), (7, 5), (12, 2))]
    assert [[piece.size for piece in window] for window in windows_of(pieces, 2)] == [[5, 1, 1], [5, 2]]
    assert [[piece.size for piece in window] for window in windows_of(pieces, 3)] == [[5, 1], [1, 5], [2]]
    assert windows_of(pieces, 1) == [pieces]
    assert [[piece.size for piece in window] for window in windows_of(pieces, 5)] == [[5], [1, 1], [5], [2]]
    with pytest.raises(UserError, match=r"locate.windows: expected 1..5, the pieces .*; got 6"):
        windows_of(pieces, 6)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares_of_a_piece_are_all_of_it(world):
    for size in (1, 2, 3, 7, 8):
        piece = Piece("a", 10, 10 + size)
        shares = [piece.share(rank, world) for rank in range(world)]
        assert list(chain(*(range(share.begin, share.end) for share in shares))) == list(range(10, 10 + size))


@pytest.mark.parametrize("score", ["linear", "snr"])
def test_a_weight_that_is_not_read_scores_nothing(tmp_path, score):
    model = tiny_llama()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(300)))
    model.model.layers[1].register_parameter("unused", torch.nn.Parameter(torch.ones(30)))
    scores = scores_of(few(model, tmp_path, score, windows=5))
    assert not scores["unused"].any() and not scores["model.layers.1.unused"].any()
    assert scores["model.norm.weight"].any()


def test_a_row_of_padding_does_not_train(tmp_path):
    """As torch has it: the embedding of the padding token gets no gradient, though a prompt has the token."""
    corpus = pair_corpus(3)
    prompts, corpus.prompts = corpus.prompts, Ragged("i")
    for prompt in prompts:
        corpus.prompts.append([0, *prompt])
    scores = scores_of(few(tiny_llama(), tmp_path, "grad_sum", corpus=corpus, windows=5))
    rows = scores["model.embed_tokens.weight"].view(61, -1)
    assert not rows[0].any() and rows[corpus.prompts[0][1]].any()


def test_an_embedding_that_scales_by_frequency_is_read_whole(tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.scale_grad_by_freq = True
    sweep = few(model, tmp_path, "grad_sum", windows=3)
    scaled = scores_of(sweep)["model.embed_tokens.weight"]
    plain = scores_of(few(tiny_llama(), tmp_path / "plain", "grad_sum", windows=3))["model.embed_tokens.weight"]
    assert ((scaled > 0) == (plain > 0)).all() and not torch.allclose(scaled, plain)


@pytest.fixture
def passes(monkeypatch):
    """Of every pass the names in its window, and what happened in it: a name for a gradient, a number for a layer."""
    seen = []
    takes, open_window, alias = (Taps._take, Taps._take_rows, Taps.take_head), Taps.open, Alias.forward

    def taken(how):
        def take(self, *given):
            name = given[0] if isinstance(given[0], str) else self.head
            if name in self._sums:
                seen[-1][1].append(name)
            how(self, *given)

        return take

    def opened(self, pieces, device, head=True):
        seen.append(({piece.name for piece in pieces}, []))
        return open_window(self, pieces, device, head)

    def made(*given):
        seen[-1][1].append("differentiable")
        return alias(*given)

    for take in takes:
        monkeypatch.setattr(Taps, take.__name__, taken(take))
    monkeypatch.setattr(Taps, "open", opened)
    monkeypatch.setattr(Alias, "forward", made)
    return seen


def watch_layers(model, passes):
    def entered(number):
        return lambda module, inputs: passes[-1][1].append(number) if passes else None

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(entered(number))


@pytest.mark.parametrize("windows", [1, 6])
def test_a_pass_computes_its_windows_layers_and_gradients_alone(tmp_path, passes, windows):
    sweep = few(tiny_llama(num_hidden_layers=4), tmp_path, "grad_sum", windows=windows)
    watch_layers(sweep.model, passes)
    scores_of(sweep)
    assert not any(weight.requires_grad for weight in sweep.model.parameters())
    scored = passes[-windows:]
    assert [names for names, _ in scored] == [{piece.name for piece in window} for window in sweep.windows]
    for names, happened in scored:
        layers = {int(name.split(".")[2]) for name in names if ".layers." in name}
        assert set(happened) - {"differentiable"} == names | layers
        products = [name for name in happened if name in names - {"model.embed_tokens.weight", "lm_head.weight"}]
        assert happened.count("differentiable") == len(products), "each is asked for; rows need none of their own"


def anatomy(model) -> list:
    """Everything that a module's class and attributes say of how it computes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (type(module), module.training, sorted(vars(module)), vars(module).get("forward"))
        + tuple(list(getattr(module, name).values()) for name in hooks)
        for module in model.modules()
    ]


class Counted(Preference):
    calls, fails_at = 0, None

    def __call__(self, logps, ref, batch):
        Counted.calls += 1
        if Counted.calls == self.fails_at:
            raise RuntimeError("in the middle")
        return super().__call__(logps, ref, batch)


def test_the_model_is_as_it_was_whatever_happened(tmp_path):
    sweep = few(tiny_llama(), tmp_path / "finished", windows=4, objective=Counted(0.5))
    norm = sweep.model.model.norm
    norm.forward = own = norm.forward  # as accelerate's, an attribute of its own
    before = anatomy(sweep.logps)
    scores_of(sweep)
    assert anatomy(sweep.logps) == before and norm.forward is own
    killed = (sweep := few(sweep.model, tmp_path / "killed", windows=4)).run()
    before = anatomy(sweep.logps)
    next(killed)
    assert anatomy(sweep.logps) != before
    killed.close()
    assert anatomy(sweep.logps) == before
    sweep = few(sweep.model, tmp_path / "failed", windows=4, objective=Counted(0.5))
    before, Counted.fails_at, Counted.calls = anatomy(sweep.logps), Counted.calls, 0  # in the last segment
    with pytest.raises(RuntimeError, match="in the middle"):
        scores_of(sweep)
    assert anatomy(sweep.logps) == before and sweep.captured


ONE_STEP = settings(per_device_train_batch_size=99, gradient_accumulation_steps=1, num_train_epochs=1)


@pytest.mark.parametrize("windows", [1, 3])
def test_other_objectives_and_references(tmp_path, windows):
    """Against autograd through the model's own weights."""
    corpus = pair_corpus(2)
    corpus.examples = [(index,) for index in range(len(corpus.responses))]
    weights = [[float(column % 2) for column in range(len(r.tokens))] for r in corpus.responses]
    for objective, reference in ((Sft(), None), (Npo(0.5), None), (Npo(0.5), tiny_llama(seed=3))):
        place = tmp_path / f"{type(objective).__name__}-{reference is None}"
        given = {"config": ONE_STEP, "corpus": corpus, "objective": objective, "token_weights": weights}
        sweep = make_sweep(tiny_llama(), place, "grad_sum", windows=windows, **given)
        if reference:
            batch = sweep.losses.of(sweep.losses.step(0)[0][0], 1.0)[0]
            logps = make_sweep(reference, place, **given).logps(batch).detach()
            by_response = sorted(zip(batch.responses.tolist(), logps, batch.valid, strict=True), key=itemgetter(0))
            sweep.losses.examples.reference = [line[valid].tolist() for _, line, valid in by_response]
        batch = sweep.losses.of(sweep.losses.step(0)[0][0], 1.0)[0]
        ours = scores_of(sweep)
        model = make_sweep(tiny_llama(), place, **given)
        logps = model.logps(batch)
        objective(logps, logps.detach() if reference is None else batch.reference, batch)[0].backward()
        for name, weight in named_weights(model.model).items():
            torch.testing.assert_close(ours[name], weight.grad.view(-1).abs(), rtol=1e-4, atol=1e-7)
