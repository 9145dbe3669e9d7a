"""Token rewards by each source, on a tiny model and responses written by hand; what forgetting makes of them."""

import json
import types
from collections import deque
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from transformers import AutoModelForCausalLM

from allo_fast.__main__ import main
from allo_fast.config import Config, UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.batch import Layout
from allo_fast.durable import SCRATCH
from allo_fast.method.selection import Selection
from allo_fast.model.saving import save_model
from allo_fast.model.weights import named_weights
from allo_fast.runs.rows import read_jsonl, write_jsonl
from allo_fast.stages import forget, gradients, implicit, rewards, rewriting
from allo_fast.stages.responses import rewarded, wrong_responses
from allo_fast.training.reference import Opened

TOKENIZER = character_tokenizer()
# Problem, gold solution, correct responses, wrong ones; the last has no correct one, and its gold solution is chosen.
PROBLEMS = [("1+1", "2", ["2", "1+1=2"], ["3", "1+1=3", "9"]), ("2+5", "7", ["7"], ["8", "1"]), ("3", "4", [], ["5"])]
TRAIN = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "save_steps": 1}


def ids(text: str) -> list[int]:
    return TOKENIZER(text).input_ids


def tokens(text: str) -> list[int]:
    return [*ids(text), TOKENIZER.eos_token_id]


def text(ids: list[int]) -> str:
    return "".join(TOKENIZER.convert_ids_to_tokens(ids))


def write_earlier_stages(folder: Path) -> Path:
    """The base in base/, another model in other/, and what sampling and pairing left."""
    save_model(tiny_llama(vocab_size=len(TOKENIZER)), TOKENIZER, folder / "base")
    save_model(tiny_llama(seed=5, vocab_size=len(TOKENIZER)), TOKENIZER, folder / "other")
    responses, pairs = [], []
    for problem, solution, right, wrong in PROBLEMS:
        judged = [{"text": t, "ids": tokens(t), "correct": t in right} for t in (*right, *wrong)]
        about = {"id": problem, "prompt": problem, "prompt_ids": ids(f"{problem}=")}
        responses.append({**about, "solution": solution, "responses": judged})
        for chosen in right or [solution]:
            names = {"chosen": chosen, "chosen_ids": tokens(chosen)}
            pairs += [{**about, **names, "rejected": t, "rejected_ids": tokens(t)} for t in wrong]
    write_jsonl(folder / "responses.jsonl", responses)
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def unit_in(folder: Path, earlier: Path, zero=None, windows="auto", **settings) -> types.SimpleNamespace:
    settings = {"template": "{}#{}?{}>", "batch_size": 2, "train": TRAIN, "dpo": TRAIN, **settings}
    data = {"train": "a", "test": "b", "prompt_template": "{}="}
    model = {"name_or_path": str(earlier / "base"), "dtype": "float32"}
    config = Config(name="x", data=data, model=model, rewards=settings, locate={"windows": windows})
    folder.mkdir(exist_ok=True)
    about = {"name": "rewards", "seed": 0, "mark": "", "needed": lambda stage: earlier, "upstream": list}
    about["owner"] = types.SimpleNamespace(home=types.SimpleNamespace(folder=folder, cache=folder / "cache"))
    return types.SimpleNamespace(**about, config=config, folder=folder, zero=zero)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_earlier_stages(tmp_path_factory.mktemp("rewards"))


@pytest.fixture
def make_unit(written, tmp_path):
    return partial(unit_in, tmp_path, written)


def run(unit) -> tuple[dict, list[dict]]:
    """What the stage records, and the rows that it wrote."""
    facts = {}

    def drive():
        facts.update((yield from rewards.execute(unit)))

    deque(drive(), maxlen=0)
    return facts, read_jsonl(unit.folder / "rewards.jsonl")


def logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """By all logits of the model, as transformers computes them."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return logits[range(len(prompt) - 1, len(prompt) + len(response) - 1), response]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rewrite_ids(row: dict) -> list[int]:
    solution = {problem: solution for problem, solution, *_ in PROBLEMS}[row["id"]]
    return ids(f"{row['prompt']}#{solution}?{row['response']}>")


def assert_probabilities(rows: list[dict], model, prompt_of) -> None:
    assert [(row["id"], row["response"]) for row in rows] == [(p[0], wrong) for p in PROBLEMS for wrong in p[3]]
    for row in rows:
        assert row["prompt_ids"] == ids(f"{row['prompt']}=") and row["response_ids"] == tokens(row["response"])
        expected = logps(model, prompt_of(row), row["response_ids"]).exp()
        torch.testing.assert_close(torch.tensor(row["rewards"]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize(
    "source, prompt_of", [("confidence", lambda row: row["prompt_ids"]), ("prompted", rewrite_ids)]
)
def test_a_frozen_models_probability_of_each_token(make_unit, written, source, prompt_of, other):
    unit = make_unit(source=source, model=str(written / "other") if other else None)
    facts, rows = run(unit)
    assert facts == {"responses": 6, "left_out": 0, "source": source}
    assert_probabilities(rows, load(written / ("other" if other else "base")), prompt_of)


@pytest.fixture
def trained(monkeypatch):
    """The policies that a source trains."""
    policies = []

    def watch(module, name):
        plain = getattr(module, name)

        def make(*given):
            policies.append(plain(*given))
            return policies[-1]

        monkeypatch.setattr(module, name, make)

    watch(gradients, "dense_policy")
    watch(gradients, "selected_policy")
    watch(implicit, "selected_policy")
    return policies


def trained_model(policy, written):
    """The policy's weights in a model of plain transformers."""
    model, weights = load(written / "base"), dict(policy.full_weights())
    with torch.no_grad():
        for name, weight in named_weights(model).items():
            weight.copy_(weights[name])
    return model


def test_a_rewriter_trains_what_it_located_and_no_more(make_unit, written, trained):
    unit = make_unit(source="rewriter", ratio=0.1)
    unit.config.locate.windows = 32
    facts, rows = run(unit)
    selection, model = Selection.load(unit.folder / "selection.safetensors"), trained_model(trained[0], written)
    assert 0 < facts["changed"] <= facts["selected"] == selection.selected == int(0.1 * selection.parameters)
    assert facts["examples"] == 6 and facts["source"] == "rewriter"
    locating = facts["locating"]
    assert (locating["examples"], locating["steps"]) == (6, 2) and locating["passes"] >= locating["windows"] == 32
    assert 4 < locating["state_bytes_per_parameter"] < 5, "an fp32 base and a window's sums"
    for name, before in named_weights(load(written / "base")).items():
        moved = (named_weights(model)[name] != before).view(-1)
        moved[selection.positions(name).unpack()] = False
        assert not moved.any(), name
    assert_probabilities(rows, model, rewrite_ids)


def test_a_dense_rewriter_locates_nothing(make_unit, written, trained):
    unit = make_unit(source="rewriter", ratio=1)
    facts, rows = run(unit)
    assert not (unit.folder / "selection.safetensors").exists() and not {"selected", "locating"} & set(facts)
    model = trained_model(trained[0], written)
    assert all((named_weights(model)[n] != w).any() for n, w in named_weights(load(written / "base")).items())
    assert_probabilities(rows, model, rewrite_ids)


def test_a_killed_rewriter_keeps_what_it_located(make_unit, tmp_path, monkeypatch):
    """And what it trained; one that was not killed gives the same."""
    unit = make_unit(source="rewriter")
    running = rewards.execute(unit)
    next(progress for progress in running if progress.noun == "step" and progress.done == 2)
    running.close()
    first = (unit.folder / "selection.safetensors").stat().st_mtime_ns
    assert not (unit.folder / SCRATCH).exists()
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "Sweep", None)
        _, rows = run(unit)
    assert (unit.folder / "selection.safetensors").stat().st_mtime_ns == first
    unit.folder = tmp_path / "straight"
    unit.folder.mkdir()
    assert run(unit)[1] == rows


def test_implicit_rewards_are_what_dpo_taught_on_each_responses_own_scale(make_unit, written, trained):
    unit = make_unit(source="implicit", ratio=0.2, dpo={**TRAIN, "beta": 0.3})
    facts, rows = run(unit)
    base, model = load(written / "base"), trained_model(trained[0], written)
    assert facts["examples"] == 9 and facts["changed"] > 0, "the run's own pairs"
    for row in rows:
        given = row["prompt_ids"], row["response_ids"]
        gained = 0.3 * (logps(model, *given) - logps(base, *given)).double()
        expected = ((gained - gained.mean()) / gained.std(correction=0)).sigmoid()
        torch.testing.assert_close(torch.tensor(row["rewards"]).double(), expected, rtol=1e-2, atol=1e-3)
        assert min(row["rewards"]) < 0.5 < max(row["rewards"])


def test_a_scale_of_its_own():
    rows = torch.tensor([[1.0, 3.0, 9.0, 9.0], [0.1, 0.1, 0.1, 9.0], [-5.0, 9.0, 9.0, 9.0], [1e-9, 2e-9, 3e-9, 6e-9]])
    valid = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    scaled = implicit.on_its_own_scale(rows, valid)
    one = 1 / (1 + torch.e**-1)
    assert scaled[0, :2].tolist() == pytest.approx([1 - one, one])
    assert scaled[1, :3].tolist() == [0.5] * 3 and scaled[2, 0] == 0.5, "equal ones, whatever their mean rounds to"
    assert scaled[3].tolist() == sorted(scaled[3].tolist()) and scaled[3, 3] > 0.8, "however small"
    assert scaled.dtype == torch.float32
    assert implicit.on_its_own_scale(torch.tensor([[torch.nan, 1.0]]), torch.ones(1, 2).bool()).isnan().all()


def test_a_reward_that_is_not_finite_ends_the_stage(make_unit, tmp_path):
    model = tiny_llama(vocab_size=len(TOKENIZER))
    about = {"id": "p", "prompt": "1", "prompt_ids": [7], "response": "x", "response_ids": [8, 1]}
    with pytest.raises(UserError, match="rewards.source: confidence: a token's reward is not finite"):
        scoring = Opened(lambda batch: torch.full(batch.valid.shape, torch.nan), Layout(), model.device)
        deque(rewarded(make_unit(source="confidence"), [about], scoring), maxlen=0)


@pytest.mark.parametrize("data_format, source", [("preference", "confidence"), ("gsm8k", "rewriter")])
def test_the_default_depends_on_the_data(data_format, source):
    data = {"train": "a", "test": "b", "format": data_format}
    config = Config(name="x", model={"name_or_path": "m"}, data=data)
    assert config.reward_source == source
    config.rewards.source = "implicit"
    assert config.reward_source == "implicit"


def test_wrong_responses_once_each_with_what_is_correct(written):
    rows = list(wrong_responses(types.SimpleNamespace(needed=lambda stage: written)))
    assert [(row["id"], row["response"]) for row in rows] == [(p[0], wrong) for p in PROBLEMS for wrong in p[3]]
    assert [text(ids) for ids in rows[0]["correct"]] == ["2<eos>", "1+1=2<eos>"] and rows[0]["solution"] == "2"
    assert [text(ids) for ids in rows[-1]["correct"]] == ["4<eos>"], "what was chosen stands in"


def test_a_correction_is_the_nearest_correct_response():
    row = {
        "id": "a",
        "rewrite_ids": [5, 6],
        "response_ids": [1, 2, 3],
        "correct": [[9, 9, 9], [1, 2, 9], [1, 2, 3, 4, 5]],
    }
    corpus = rewriting._corrections([row])
    assert corpus.prompts == [[5, 6]] and corpus.responses[0].tokens == [1, 2, 9]


def test_what_cannot_be_rewritten_is_left_out(make_unit, written, tmp_path):
    """A prompt of no token, and one that the model cannot read with the longest response behind it."""
    rows = list(wrong_responses(types.SimpleNamespace(needed=lambda stage: written)))
    room = 128 - len("1+1#2?3>")
    fits, long = ({**rows[0], "correct": [[5] * length]} for length in (room, room + 1))
    (left,) = rewriting._rewrites(make_unit(source="prompted"), [fits, long], written / "base")
    assert text(left["rewrite_ids"]) == "1+1#2?3>" and left["correct"] == fits["correct"]
    (tmp_path / "rewrites.jsonl").unlink()
    empty = {**rows[0], "prompt": "", "solution": "", "response": ""}
    unit = make_unit(source="prompted", template="{}{}{}")
    assert len(rewriting._rewrites(unit, [empty, fits], written / "base")) == 1
    (tmp_path / "rewrites.jsonl").unlink()
    with pytest.raises(UserError, match=r"rewards: the shortest rewriting prompt .* has 129 tokens, .*base reads 128"):
        rewriting._rewrites(make_unit(source="prompted"), [long], written / "base")


def test_the_tokens_a_rewriter_would_change_are_forgotten():
    rows = [
        {"id": "a", "prompt_ids": [1], "response_ids": [2, 3, 1], "rewards": [0.9, 0.1, 0.5]},
        {"id": "a", "prompt_ids": [1], "response_ids": [5, 1], "rewards": [0.2, 0.9]},
        {"id": "b", "prompt_ids": [2], "response_ids": [4, 1], "rewards": [0.6, 0.7]},
    ]
    corpus, weights = forget.weighted_corpus(rows, 0.5)
    assert weights == [[0, 1, 0], [1, 0]] and corpus.prompts == [[1]], "nothing is forgotten of the second problem"
    assert [response.tokens for response in corpus.responses] == [[2, 3, 1], [5, 1]]
    _, release = forget.weighted_corpus(rows, None)
    assert list(map(pytest.approx, release)) == [row["rewards"] for row in rows]


def test_rewards_as_the_published_code_writes_them(tmp_path):
    path = tmp_path / "rewards.jsonl"
    row = {"input": "1+1=", "output": "3", "reward": [0.25, 1], "ref_prob": [-1.0, -2.0]}
    write_jsonl(path, [row, {"prompt": "2+2=", "response": "5", "rewards": [0.5]}])
    by_response = rewards.read_rewards(str(path))
    assert by_response("1+1=", "3") == [0.25, 1] and by_response("2+2=", "5") == [0.5]
    assert by_response("1+1=", "4") is None


def test_bad_reward_files(tmp_path):
    path = tmp_path / "rewards.jsonl"
    for line, message in (
        ("{", "rewards.jsonl:1: not JSON"),
        ('{"response": "x", "rewards": []}', "expected the fields prompt, response and rewards"),
        (json.dumps({"prompt": "p", "response": "x", "rewards": [2.0]}), "expected numbers in 0..1"),
        (json.dumps({"prompt": "p", "response": "x", "rewards": [True]}), "expected numbers in 0..1"),
        (
            "\n".join(json.dumps({"prompt": "p", "response": "x", "rewards": [x]}) for x in (0.5, 0.5, 0.25)),
            "rewards.jsonl:3: other rewards than an earlier row has for the same response",
        ),
        (json.dumps({"prompt": "p", "response": ["x"], "rewards": []}), "1: response: expected a text, got ..x.."),
        (
            '{"prompt": "p", "prompt": "q", "response": "x", "rewards": []}',
            "1: not JSON: the key 'prompt' stands twice",
        ),
        ("[" * 100_000, "rewards.jsonl:1: nested more than 50 deep"),
    ):
        path.write_text(line)
        with pytest.raises(UserError, match=message):
            rewards.read_rewards(str(path))
    with pytest.raises(UserError, match="no such file"):
        rewards.read_rewards(str(tmp_path / "none"))


def test_the_mean_of_a_response_as_its_threshold():
    assert forget.token_weights([0.2, 0.4, 0.9], "mean") == [1, 1, 0]
    assert forget.token_weights([0.1] * 3, "mean") == [0, 0, 0], "whatever the mean of equal ones rounds to"
    about = {"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "a", "test": "b"}}
    for threshold in (-0.1, 1.1, "median"):
        with pytest.raises(ValueError, match="threshold"):
            Config(**about, forget={"threshold": threshold})


def test_a_pattern_that_matches_nothing_ends_it_before_anything_is_located(make_unit, monkeypatch):
    unit = make_unit(source="rewriter")
    unit.config.locate.exclude = ["*nothing*"]
    monkeypatch.setattr(gradients, "Sweep", None)
    with pytest.raises(UserError, match=r"'\*nothing\*' matches no tensor"):
        run(unit)


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("threshold, said", [(0.99, True), (0.5, False)])
def test_forgetting_nearly_everything_is_said(copied, capsys, caplog, threshold, said):
    config, folder = copied
    rewards_file = folder / "06-rewards/seed-0/rewards.jsonl"
    assert all(reward < 0.99 for row in read_jsonl(rewards_file) for reward in row["rewards"])
    threshold = threshold if said else sorted(r for row in read_jsonl(rewards_file) for r in row["rewards"])[2]
    assert main(["forget", str(config), "seeds=[0]", f"forget.threshold={threshold}", "--rerun"]) == 0
    assert ("forget.threshold=mean forgets those below" in caplog.text + capsys.readouterr().err) == said
