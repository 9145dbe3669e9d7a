"""What single stages do, on inputs small enough to work out by hand."""

import os
import types

import pytest
import torch
from conftest import TINY, pair_corpus, tiny_llama
from tiny import metaspace
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from allo_fast.config import Config, UserError
from allo_fast.data.arithmetic import arithmetic_row, careless_solution, character_tokenizer
from allo_fast.data.batch import collate
from allo_fast.model.generation import generate, stop_tokens
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.saving import save_model
from allo_fast.runs.rows import read_jsonl, write_jsonl
from allo_fast.stages import models, pairs, pretrain, sample
from allo_fast.stages.pairs import part_of


def run_pairs(tmp_path, rows, seed=0, **settings):
    """The pairs stage on given responses."""
    count_pairs(tmp_path, rows, seed, **settings)
    return [(row["chosen"], row["rejected"]) for row in read_jsonl(tmp_path / "pairs.jsonl")]


def count_pairs(tmp_path, rows, seed=0, **settings) -> dict:
    """What the stage says of them."""
    write_jsonl(tmp_path / "responses.jsonl", rows)
    data = {"train": "arithmetic:train[:1]", "test": "arithmetic:test[:1]"}
    unit = types.SimpleNamespace(
        folder=tmp_path,
        seed=seed,
        config=Config(name="x", data=data, pairs=settings),
        needed=lambda stage: tmp_path,
    )
    stage = pairs.execute(unit)
    next(stage)
    with pytest.raises(StopIteration) as end:
        next(stage)
    return end.value.value


@pytest.fixture
def reference_unit(tmp_path):
    """A stage whose base lies in `base`, and beside it: another model, one with another vocabulary, one that slides."""
    tokenizer = character_tokenizer()
    larger = character_tokenizer()
    larger.add_tokens(["zz"])
    save_model(tiny_llama(), tokenizer, tmp_path / "base")
    save_model(tiny_llama(seed=5), tokenizer, tmp_path / "other")
    save_model(tiny_llama(), larger, tmp_path / "larger")
    sliding = MistralConfig(**TINY, sliding_window=4)
    save_model(MistralForCausalLM(sliding), tokenizer, tmp_path / "sliding")
    data = {"train": "a", "test": "b"}
    model = {"name_or_path": str(tmp_path / "base"), "dtype": "float32"}
    return types.SimpleNamespace(name="learn", zero=None, config=Config(name="x", data=data, model=model))


def test_a_reference_is_the_model_that_was_named(tmp_path, reference_unit):
    batch = collate(corpus := pair_corpus(), corpus.examples)
    with models.frozen_reference(reference_unit, str(tmp_path / "other"))() as opened:
        found = opened.compute(batch.to(opened.device)).cpu()
    torch.testing.assert_close(found, ResponseLogps(tiny_llama(seed=5))(batch).detach())
    assert models.frozen_reference(reference_unit, None) is None


def test_a_reference_has_a_layout_of_its_own(tmp_path, reference_unit):
    with models.frozen_reference(reference_unit, str(tmp_path / "sliding"))() as opened:
        assert not opened.layout.share_prompts


def problem(correct, wrong, name="p"):
    judged = [(text, True) for text in correct] + [(text, False) for text in wrong]
    responses = [{"text": text, "ids": [*text.encode()], "correct": right} for text, right in judged]
    gold = {"solution": "gold", "solution_ids": [*b"gold"]}
    return {"id": name, "prompt": name, "prompt_ids": [1], **gold, "answer": "1", "responses": responses}


def test_pairs_are_all_correct_against_all_wrong_without_duplicates(tmp_path):
    found = run_pairs(tmp_path, [problem(["a", "a", "b"], ["x", "y", "x", " "])])
    assert sorted(found) == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]


def test_pairs_that_say_the_same_again_or_the_opposite_are_counted(tmp_path):
    rows = [problem("a", "x"), problem("a", "x"), problem("x", "a"), problem("b", "x")]
    counts = count_pairs(tmp_path, rows)
    assert (counts["pairs"], counts["repeated"], counts["contradictory"]) == (4, 1, 3)
    other = {**problem("x", "a"), "prompt_ids": [2]}
    assert not {"repeated", "contradictory"} & count_pairs(tmp_path, [rows[0], other]).keys()


def test_weights_that_are_all_zero_are_refused(tmp_path):
    rows = [{**problem("ab", "x"), "loss_weight": 0.0}, {**problem("a", "xy"), "loss_weight": 0}]
    with pytest.raises(UserError, match="loss_weight: those of all pairs that train are 0"):
        run_pairs(tmp_path, rows)
    assert count_pairs(tmp_path, [rows[0], problem("a", "x")])["pairs"] == 3
    rows = [{**problem("a", "x"), "prompt_ids": [number], "loss_weight": 1} for number in range(20)]
    held_out = [part_of(row, 0.3)[0] for row in rows]
    assert 0 < sum(held_out) < 20
    for side, said in ((False, "train"), (True, "pairs.eval_size holds out")):
        weighed = [{**row, "loss_weight": int(is_out != side)} for row, is_out in zip(rows, held_out, strict=True)]
        with pytest.raises(UserError, match=f"loss_weight: those of all pairs that {said} are 0"):
            run_pairs(tmp_path, weighed, eval_size=0.3)
        weighed[held_out.index(side)]["loss_weight"] = 0.1
        run_pairs(tmp_path, weighed, eval_size=0.3)


def test_pairs_are_drawn_by_seed_up_to_the_limit(tmp_path):
    rows = [problem("abcd", "wxyz")]
    draws = [run_pairs(tmp_path, rows, seed, max_pairs=3) for seed in (0, 0, 1)]
    assert [len(set(draw)) for draw in draws] == [3, 3, 3] and draws[0] == draws[1] != draws[2]


def test_gold_stands_in_only_where_nothing_is_correct(tmp_path):
    rows = [problem([], ["x", "gold"], "p"), problem(["a"], ["y"], "q")]
    assert run_pairs(tmp_path, rows) == [("a", "y")]
    assert run_pairs(tmp_path, rows, gold="missing") == [("gold", "x"), ("a", "y")], "and never against itself"
    with pytest.raises(UserError, match="no pair left: of 1 problems 0 have no correct response and 1 no wrong one"):
        run_pairs(tmp_path, [problem(["a"], [])])
    graded = problem(["a"], ["b"])
    for response in graded["responses"]:
        response["correct"] = None
    with pytest.raises(UserError, match=r"and 2 no wrong one \(in 1 all have one score\); sample more"):
        run_pairs(tmp_path, [graded, problem(["a"], [])])


TOKENIZER = character_tokenizer()


def respond(model, **settings):
    return generate(model, TOKENIZER, [[5, 6], [7]], {TOKENIZER.eos_token_id}, max_new_tokens=6, **settings)


def test_greedy_is_greedy_whatever_the_model_was_shipped_with():
    model = tiny_llama(vocab_size=len(TOKENIZER))
    plain = respond(model)
    model.generation_config = shipped = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=5.0)
    assert [respond(model, seed=seed) for seed in range(3)] == [plain] * 3
    assert model.generation_config is shipped


def test_sampling_repeats_by_seed_and_padding_does_not_matter():
    model = tiny_llama(vocab_size=len(TOKENIZER))
    draws = [respond(model, seed=seed, temperature=1.0, num_return_sequences=2) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and [len(texts) for texts in draws[0]] == [2, 2]
    alone = generate(model, TOKENIZER, [[7]], {TOKENIZER.eos_token_id}, max_new_tokens=6)
    assert respond(model)[1] == alone[0]


def test_responses_end_where_the_model_says_too_and_keep_their_space():
    """A model that says " No", then the token that its own generation configuration stops at, then more."""
    tokenizer = metaspace()
    said = [
        *tokenizer(":No", add_special_tokens=False).input_ids,
        300,
        *tokenizer("So", add_special_tokens=False).input_ids,
    ]
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=700, num_hidden_layers=1, intermediate_size=4)
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0 if "norm" in name else 0.0)
    model.model.embed_tokens.weight.data[range(len(tokenizer)), range(len(tokenizer))] = 1
    prompt = tokenizer("Q:").input_ids
    for before, after in zip([prompt[-1], *said[1:]], said[1:] + [2], strict=False):
        model.lm_head.weight.data[after, before] = 9
    model.generation_config.eos_token_id = [300, 301]
    tokenizer.pad_token = "</s>"
    assert stop_tokens(model) == {300, 301}
    ((response,),) = generate(model, tokenizer, [prompt], {2}, max_new_tokens=8)
    assert response == tokenizer.decode([*prompt, *said[1 : said.index(300)]]).removeprefix(tokenizer.decode(prompt))
    assert response


def test_logits_that_are_not_finite_end_a_generation():
    model = tiny_llama(vocab_size=len(TOKENIZER))
    model.model.norm.weight.data.fill_(3e38)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="LlamaForCausalLM: its logits are not finite"):
            respond(model, temperature=temperature)


def test_padding_needs_no_token_of_its_own():
    tokenizer = character_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "<outside the embedding>"})
    assert len(generate(model, tokenizer, [[5, 6], [7]], {1}, max_new_tokens=3)) == 2


@pytest.mark.parametrize("links", [True, False])
def test_given_responses_are_the_problems_rows_again(tmp_path, monkeypatch, links):
    (tmp_path / "problems.jsonl").write_text("rows")
    (tmp_path / "responses.jsonl").write_text("of a killed session")
    if not links:
        monkeypatch.setattr("pathlib.Path.hardlink_to", lambda *_: os.link(tmp_path / "nowhere", tmp_path / "to"))
    sample._link(tmp_path / "problems.jsonl", tmp_path / "responses.jsonl")
    assert (tmp_path / "responses.jsonl").read_text() == "rows"
    assert (tmp_path / "responses.jsonl").samefile(tmp_path / "problems.jsonl") == links


@pytest.mark.parametrize("careless, least, most", [(0, 0, 0), (0.5, 0.4, 0.6), (1, 1, 1)])
def test_a_share_of_what_is_pretrained_on_is_careless(tmp_path, monkeypatch, careless, least, most):
    data = {"train": "arithmetic:train[:1]", "test": "arithmetic:test[:1]", "prompt_template": "{}="}
    small = {"problems": 200, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model, shape = {"dtype": "float32", "device": "cpu"}, {**small, "num_attention_heads": 1, "careless": careless}
    config = Config(name="x", data=data, pretrain=shape, model=model)
    seen = []
    monkeypatch.setattr(pretrain, "trainer_of", lambda unit, policy, corpus, *_, **__: seen.append(corpus) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(pretrain.execute(types.SimpleNamespace(folder=tmp_path, seed=0, config=config)))
    (corpus,) = seen
    tokenizer = character_tokenizer()
    written = [tokenizer.decode(response.tokens[:-1]) for response in corpus.responses]
    rows = [arithmetic_row("train", index) for index in range(200)]
    assert all(
        text in (row["solution"], careless_solution(row["problem"])) for text, row in zip(written, rows, strict=True)
    )
    with_minus = [number for number, row in enumerate(rows) if "-" in row["problem"]]
    share = sum(written[number] != rows[number]["solution"] for number in with_minus) / len(with_minus)
    assert least <= share <= most
