"""The stage that locates: end to end on the micro job, what it leaves, and what it refuses."""

import json
import shutil
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama, units_read
from sweeps import few, scores_of
from transformers import AutoModelForCausalLM

from allo_fast.__main__ import main
from allo_fast.config import GRADIENT_SCORES, Config, UserError
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.corpus import Corpus
from allo_fast.durable import SCRATCH
from allo_fast.method.objectives import Npo, Sft
from allo_fast.method.scores import Random
from allo_fast.method.selection import Selection
from allo_fast.model.saving import save_model
from allo_fast.model.weights import fingerprint, named_weights
from allo_fast.runs.home import MANIFEST
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, gradients, locate

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture
def located(copied, capsys):
    """Runs the stage again for one seed of the finished micro run, with other settings; its folder, or what it says."""
    config, folder = copied

    def run(*overrides, code=0):
        assert main(["locate", str(config), "seeds=[0]", *overrides, "--rerun"]) == code
        return folder / "05-locate/seed-0" if not code else capsys.readouterr().err

    return run


def base_of(folder: Path):
    path = folder.parents[1] / "00-pretrain/base/model"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def selected(folder: Path, stage: str = "learn") -> dict[str, list[int]]:
    selection = Selection.load(folder / f"{stage}.safetensors")
    return {name: selection.positions(name).unpack().tolist() for name in selection.names}


def expect(scores: dict[str, torch.Tensor], ratio: float, **settings) -> dict[str, list[int]]:
    selection = Selection.from_scores(scores, ratio, base="", **settings)
    return {name: selection.positions(name).unpack().tolist() for name in selection.names}


def test_linear_end_to_end(located):
    folder = located("locate.score=null", "locate.windows=3")
    facts = json.loads((folder / MANIFEST).read_text())
    assert sorted(facts["outputs"]) == ["counts.json", "forget.safetensors", "learn.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*facts["outputs"], MANIFEST])
    assert units_read(facts) == {"pretrain/base", "pairs/seed-0"}
    facts = facts["facts"]
    assert (facts["score"], facts["windows"], facts["passes"]) == ("linear", 3, 4)
    weights = named_weights(base_of(folder))
    assert facts["parameters"] == sum(weight.numel() for weight in weights.values())
    assert facts["state_bytes_per_parameter"] == pytest.approx(4 + 16 / 3, rel=0.1)
    selection = Selection.load(folder / "learn.safetensors")
    selection.check(base_of(folder))
    assert selection.selected == facts["learn_selected"] == int(0.1 * facts["parameters"])
    counts = json.loads((folder / "counts.json").read_text())["learn"]
    assert counts == {name: [len(selection.positions(name)), w.numel()] for name, w in weights.items()}
    whole = located("locate.score=null", "locate.windows=1")
    assert Selection.load(whole / "learn.safetensors").sha256() == selection.sha256()
    assert facts["forget_sha256"] == json.loads((whole / MANIFEST).read_text())["facts"]["forget_sha256"]


def test_a_killed_stage_goes_on(copied):
    config, folder = copied

    def unit():
        run = Run(load_config(config, ["locate.score=linear", "locate.windows=4"]), STAGES, rerun=True)
        return Unit(run, "locate", "seed-0")

    deque(unit().execute(), maxlen=0)
    straight = selected(unit().folder)
    shutil.rmtree(unit().folder)
    killed = unit().execute()
    next(progress for progress in killed if any((unit().folder / SCRATCH).glob("score-001*")))
    killed.close()
    first = (unit().folder / SCRATCH / "score-000.rank-0-of-1.safetensors").stat().st_mtime_ns
    continued = unit().execute()
    left = next(continued).total
    assert (unit().folder / SCRATCH / "score-000.rank-0-of-1.safetensors").stat().st_mtime_ns == first
    deque(continued, maxlen=0)
    steps = json.loads((unit().folder / MANIFEST).read_text())["facts"]["steps"]
    assert left == 3 * steps, "a micro-batch a step: what was kept of each, and two passes"
    assert selected(unit().folder) == straight and not (unit().folder / SCRATCH).exists()


def test_fewer_pairs(located):
    fewer = "locate.score=grad_sum", "locate.pairs=4", "rewards.source=confidence"
    facts = json.loads((located(*fewer) / MANIFEST).read_text())["facts"]
    assert (facts["examples"], facts["steps"]) == (4, 1)
    whole = json.loads((located("locate.score=grad_sum") / MANIFEST).read_text())["facts"]
    cut = json.loads((located("locate.score=grad_sum", "warmup.max_tokens_per_batch=60") / MANIFEST).read_text())[
        "facts"
    ]
    assert "set_aside" not in whole and 0 < cut["set_aside"] == whole["examples"] - cut["examples"], cut
    said = located(*fewer, "warmup.gradient_accumulation_steps=2", code=2)
    assert "locate.pairs: expected at least the 8 of a step of warmup, got 4" in said


def test_drawn_pairs_keep_their_order_and_depend_on_the_seed():
    config = Config(**ABOUT).warmup.model_copy(update={"gradient_accumulation_steps": 1})
    corpus = Corpus(examples=[(number,) for number in range(40)])
    draws = [gradients.drawn(corpus, 5, config, seed).examples for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and draws[0] == sorted(draws[0]) and len(set(draws[0])) == 5
    assert gradients.drawn(corpus, 41, config, 0) is corpus is gradients.drawn(corpus, None, config, 0)


def test_magnitude_random_and_last(located):
    folder = located("locate.score=magnitude", "locate.last=true")
    scores = {name: weight.detach().abs() for name, weight in named_weights(base_of(folder)).items()}
    assert selected(folder) == expect(scores, 0.1, last=True)
    assert selected(located("locate.score=magnitude", "locate.scope=per_tensor")) == expect(
        scores, 0.1, scope="per_tensor"
    )
    drawn = selected(located("locate.score=random"))
    assert drawn == expect({name: Random(name, w.numel(), 0) for name, w in scores.items()}, 0.1)


def test_what_another_training_changed(located, tmp_path, copied):
    folder = copied[1] / "05-locate/seed-0"
    after = base_of(folder)
    draw = torch.Generator().manual_seed(0)
    changes = {name: torch.randn(weight.shape, generator=draw) for name, weight in named_weights(after).items()}
    before = {name: weight.detach().clone() for name, weight in named_weights(after).items()}
    with torch.no_grad():
        for name, weight in named_weights(after).items():
            weight += changes[name]
    save_model(after, character_tokenizer(), tmp_path / "after")
    moved = {name: weight.detach() - before[name] for name, weight in named_weights(after).items()}
    folder = located("locate.score=null", f"locate.after={tmp_path / 'after'}")
    assert selected(folder) == expect(moved, 0.1)
    assert units_read(json.loads((folder / MANIFEST).read_text())) == {"pretrain/base"}


def test_a_change_below_the_bases_rounding_counts(tmp_path):
    """It is between the models as they lie there, whatever the dtype in which the base is trained."""
    base, after = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for weight in after.parameters():
            weight.view(-1)[::10] += 1e-6
    for name, model in (("base", base), ("after", after)):
        save_model(model, character_tokenizer(), tmp_path / name)
    data, model = {"train": "a", "test": "b"}, {"name_or_path": str(tmp_path / "base"), "dtype": "bfloat16"}
    config = Config(name="x", data=data, model=model, locate={"after": str(tmp_path / "after")})
    scored = locate._without_gradients(SimpleNamespace(config=config, zero=None), tmp_path / "base")
    chosen = locate.select(config, scored, 0.05)
    assert chosen.base == fingerprint(base.bfloat16())
    assert all(int(position) % 10 == 0 for name in chosen.names for position in chosen.positions(name).unpack())


def test_another_architecture_is_refused(located, tmp_path):
    save_model(tiny_llama(), character_tokenizer(), tmp_path / "after")
    said = located("locate.score=null", f"locate.after={tmp_path / 'after'}", code=2)
    assert f"locate.after: {tmp_path / 'after'}: " in said and "not the same model" in said


def test_what_is_located_for_rewards_depends_on_how(copied):
    config, _ = copied
    bases = []
    for overrides in ([], ["locate.exclude=['*norm*']"], ["locate.clip=false"], ["locate.last=true"]):
        unit = Unit(Run(load_config(config, overrides), STAGES, rerun=True), "rewards", "seed-0")
        bases.append(unit.basis())
    assert bases[0] == bases[3] and bases[1] != bases[0] != bases[2]


def test_sparse_dpo_has_one_selection(located):
    folder = located("locate.score=null", "method=sparse-dpo")
    assert [path.name for path in folder.glob("*.safetensors")] == ["learn.safetensors"]
    assert list(json.loads((folder / "counts.json").read_text())) == ["learn"]


ABOUT = {"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "a", "test": "b"}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"protocol": "release", "locate": {"score": "linear"}}, "locate.score: .*release has delta alone, got linear"),
        *(
            ({"protocol": "release", "locate": {key: value}}, f"locate.{key}: protocol: release ranks single weights")
            for key, value in (("last", True), ("rows", True), ("scope", "per_tensor"))
        ),
        ({"locate": {"skip": 0.97}}, "locate.skip plus a stage's ratio is more than 1"),
        ({"locate": {"score": "snr", "after": "m"}}, "locate.after takes the place of locate.score"),
        ({"locate": {"pairs": 31}}, "locate.pairs: expected at least the 32 of a step of warmup, got 31"),
        ({"locate": {"pairs": 100}}, "locate.pairs: .* the 128 of a step of rewards.train, got 100"),
        ({"locate": {"pairs": 31}, "sft": {}}, "locate.pairs: .* of a step of sft, got 31"),
        ({"locate": {"windows": 0}}, "locate.windows"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**ABOUT, **changes)


def test_ratios_of_other_methods_are_no_matter():
    Config(**ABOUT, method="sparse-dpo", locate={"skip": 0.96}, learn={"ratio": 0.01}, forget={"ratio": 0.05})


def test_one_step_has_no_signal_to_noise_ratio(located):
    one = ["warmup.per_device_train_batch_size=64", "warmup.gradient_accumulation_steps=1"]
    assert "locate.score: snr: expected at least two optimizer steps, got one" in located(
        "locate.score=snr", *one, code=2
    )


def test_windows_beyond_the_pieces(tmp_path):
    with pytest.raises(UserError, match=r"locate.windows: expected 1..141, the pieces .*; got 1000"):
        few(tiny_llama(), tmp_path, windows=1000)
    assert not list(tmp_path.iterdir()), "another session may ask for fewer"


def counted(objective):
    """How often its loss was asked for."""

    class Counted(type(objective)):
        calls = 0

        def __call__(self, *given):
            type(self).calls += 1
            return super().__call__(*given)

    return Counted(**vars(objective))


def responses_corpus():
    corpus = Corpus()
    for prompt in range(3, 8):
        corpus.examples.append(tuple(corpus.add([prompt, 5], [[7, prompt, 9]])))
    return corpus


def test_token_weights_that_are_all_zero(tmp_path):
    corpus, objective = responses_corpus(), counted(Npo(0.5))
    sweep = few(tiny_llama(), tmp_path, corpus=corpus, objective=objective, token_weights=[[0.0] * 3] * 5, windows=9)
    with pytest.raises(
        UserError, match="locate.score: linear: expected a loss that depends on the model, got none in 5"
    ):
        scores_of(sweep)
    assert objective.calls == 3, "each micro-batch is looked at once, before any pass"


def test_a_loss_that_does_not_depend_on_the_model(tmp_path):
    class Constant(Sft):
        def __call__(self, logps, ref, batch):
            return torch.tensor(1.0), {}

    with pytest.raises(UserError, match="expected a loss that depends on the model"):
        scores_of(few(tiny_llama(), tmp_path, objective=Constant()))


def test_pairs_whose_responses_are_the_same(tmp_path):
    corpus = responses_corpus()
    corpus.examples = [(index, index) for (index,) in corpus.examples]
    with pytest.raises(UserError, match="do they differ"):
        scores_of(few(tiny_llama(), tmp_path, corpus=corpus))


@pytest.mark.parametrize("windows", [1, 5])
def test_what_is_not_finite(tmp_path, windows):
    broken = few(tiny_llama(), tmp_path / "loss", windows=windows)
    with torch.no_grad():
        broken.model.lm_head.weight[5] = torch.inf
    with pytest.raises(UserError, match="locate.score: linear: expected a finite loss at the frozen base, got nan"):
        scores_of(broken)

    class Steep(Sft):
        """Finite, but its gradient is not."""

        def __call__(self, logps, ref, batch):
            return logps.sum() + (logps - logps.detach()).abs().sqrt().nan_to_num().sum(), {}

    with pytest.raises(UserError, match="locate.score: snr: the gradient of .* is not finite"):
        scores_of(few(tiny_llama(), tmp_path / "gradient", "snr", objective=Steep(), windows=windows))
    assert not list((tmp_path / "gradient").glob("score*"))


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_what_is_not_finite_later(tmp_path, score):
    """Only the first step's gradients are looked at; a later one's reach the score."""

    class SteepLater(Sft):
        steps = 0

        def __call__(self, logps, ref, batch):
            type(self).steps += 1
            loss = (logps - logps.detach()).abs().sqrt().nan_to_num().sum() if self.steps > 2 else 0.0
            return logps.sum() + loss, {}

    with pytest.raises(UserError, match=f"locate.score: {score}: the score of .* is not finite"):
        scores_of(few(tiny_llama(), tmp_path, score, objective=SteepLater(), clip=False))
