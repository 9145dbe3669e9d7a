"""What has a million rows: it is read, written and kept without being in memory, and is the same as if it were."""

import json
import random
import tracemalloc
from collections import deque
from contextlib import nullcontext
from functools import partial
from operator import eq
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import pair_corpus, tiny_llama

from allo_fast.config import Config, TrainConfig, UserError
from allo_fast.data import arrays
from allo_fast.data.arrays import Chained, Chunks, Ragged, Tuples
from allo_fast.data.batch import Layout, collate
from allo_fast.data.corpus import Corpus
from allo_fast.data.encoding import Limits, corpus_of_pairs
from allo_fast.durable import Damaged, locked
from allo_fast.model.weights import fingerprint
from allo_fast.runs.rows import by_chunks, read_jsonl, rendered_once, split_once, write_jsonl
from allo_fast.stages import forget, pairs, problems, responses
from allo_fast.training.examples import Examples
from allo_fast.training.reference import Opened, described, reference_logps
from allo_fast.training.steps import shuffled

ROWS = [{"text": "a\u2028b\u0085c\nd\re"}, {"text": "e" * 5000}, {"text": ""}, {"text": "\U0001f600"}]


def unit(folder, **settings):
    data = {"train": str(folder / "train.jsonl"), "test": "x", "format": "preference"}
    config = Config(name="x", data=data, model={"name_or_path": "base"}, **settings)
    return SimpleNamespace(folder=folder, mark="a", seed=0, config=config, needed=lambda stage: folder)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_lists_of_numbers(tmp_path, monkeypatch, on_disk):
    monkeypatch.setattr(arrays, "_SPILL", 4)
    lists, folder = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9]], tmp_path if on_disk else None
    ragged, tuples = Ragged("i", folder), Tuples(folder)
    for numbers in lists:
        ragged.append(numbers)
        tuples.append((len(numbers), 0))
    assert ragged == lists != Ragged("i", folder) and ragged[-1] == lists[-1] and ragged[1:3] == lists[1:3]
    assert ragged.lengths.tolist() == [3, 0, 1, 5] and tuples == [(3, 0), (0, 0), (1, 0), (5, 0)]
    ragged.append([2**31 - 1])  # after it was read
    tuples += [(7, 7)]
    assert ragged[4] == [2**31 - 1] and ragged[3] == lists[3] and tuples[-1] == (7, 7)
    with pytest.raises(IndexError):
        ragged[5]
    assert not any(tmp_path.iterdir()), "no file that somebody would have to remove"


def test_chunks():
    chunks = Chunks(np.arange(5), 2)
    assert chunks == [[0, 1], [2, 3], [4]] and Chained([chunks, chunks])[3:5] == [[0, 1], [2, 3]]
    assert Chunks(np.arange(6).reshape(3, 2), 2) == [[(0, 1), (2, 3)], [(4, 5)]]


def test_a_disk_that_refuses(tmp_path):
    ragged = Ragged("i", tmp_path / "gone")
    with pytest.raises(UserError, match="gone: cannot be written: No such file"):
        ragged.append(range(arrays._SPILL + 1))


def test_rows_are_those_of_the_file(tmp_path):
    write_jsonl(path := tmp_path / "rows.jsonl", ROWS)
    rows = read_jsonl(path)
    assert rows == ROWS and list(rows) == ROWS and rows[-1] == ROWS[-1] and rows[1:3] == ROWS[1:3]
    assert rows[::-2] == ROWS[::-2] and rows.only([3, 0]) == [ROWS[3], ROWS[0]]
    path.write_bytes(b"\n" + path.read_bytes()[:-1])
    assert read_jsonl(path) == ROWS, "an empty line is none, and the last needs no end"
    path.write_bytes(b'{"a": 1}\n{"a": \n{}\n')
    rows = read_jsonl(path)
    assert rows[0] == {"a": 1} and rows[2] == {}
    with pytest.raises(Damaged, match="rows.jsonl: damaged: row 2: Expecting value"):
        list(rows)
    path.unlink()
    with pytest.raises(Damaged, match="rows.jsonl: damaged: No such file"):
        rows[0]
    with pytest.raises(Damaged, match="none.jsonl: damaged: No such file"):
        read_jsonl(tmp_path / "none.jsonl")


def rendered(*rows):
    """What gives rows for a and b, and ends in the middle where a row is an error."""

    def render():
        for number, row in enumerate(rows):
            if isinstance(row, BaseException):
                raise row
            yield {"row": row}, "ab"[number % 2]

    return render


def test_several_files_are_written_together_and_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("allo_fast.runs.rows._CHUNK", 2)
    with pytest.raises(KeyboardInterrupt):
        split_once(unit(tmp_path), ("a", "b"), rendered(1, 2, 3, 4, 5, KeyboardInterrupt()))
    assert len(read_jsonl(tmp_path / "a")) == 2
    whole = [{"row": 6}, {"row": 8}], [{"row": 7}]
    assert split_once(unit(tmp_path), ("a", "b"), rendered(6, 7, 8)) == list(whole), "none of the killed one's rows"
    assert split_once(unit(tmp_path), ("a", "b"), rendered(KeyboardInterrupt())) == list(whole)
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes().replace(b"7", b"9"))
    assert split_once(unit(tmp_path), ("a", "b"), rendered(6, 7, 8)) == list(whole)
    assert "b: damaged after row 0; what follows is not taken" in caplog.text
    said = tmp_path / "a.whole.sums"
    said.write_bytes(said.read_bytes().replace(b"2", b"3"))
    assert split_once(unit(tmp_path), ("a", "b"), rendered(6, 7, 8)) == list(whole)
    assert "a.whole.sums: damaged" in caplog.text
    assert rendered_once(unit(tmp_path), "c", lambda: iter(ROWS)) == ROWS


def test_chunks_go_on_and_nothing_keeps_the_rows(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"number": number} for number in range(7)])
    items, seen = read_jsonl(tmp_path / "rows.jsonl"), []

    def work(chunk, start):
        seen.append((start, len(chunk)))
        return [{"square": row["number"] ** 2} for row in chunk]

    def run():
        return by_chunks(unit(tmp_path), "done.jsonl", items, 3, "number", work)

    next(killed := run())
    killed.close()
    with pytest.raises(StopIteration) as end:
        going = run()
        while True:
            next(going)
    assert end.value.value == [{"square": number**2} for number in range(7)]
    assert seen == [(0, 3), (3, 3), (6, 1)]


@pytest.mark.parametrize("sharded, seen", [(True, [(3, 2), (0, 3)]), (False, [(3, 2)])])
def test_a_rank_without_a_chunk_of_its_own_does_anothers_for_a_model_in_shares(tmp_path, monkeypatch, sharded, seen):
    done, work = [], lambda chunk, start: done.append((start, len(chunk))) or [{}] * len(chunk)
    for rank in (1, 2):
        place = {
            "world_size": lambda: 3,
            "rank": lambda rank=rank: rank,
            "is_main": lambda: False,
            "on_main": lambda work: 0,
        }
        place |= {"agree_on": lambda *_: None, "gather": lambda rows: [[{}] * 3, [{}] * 2, []]}
        for name, value in place.items():
            monkeypatch.setattr(f"allo_fast.runs.rows.ranks.{name}", value)
        monkeypatch.setattr("allo_fast.runs.rows.read_jsonl", lambda path: [])
        list(by_chunks(unit(tmp_path), "done.jsonl", [*range(5)], 3, "number", work, sharded))
    assert done == seen


def test_the_order_of_micro_batches_is_that_of_lists():
    corpus = pair_corpus(problems=50)
    corpus = corpus.only(random.Random(3).sample(range(100), 61))  # problems apart from one another
    by_prompt: dict[int, list] = {}
    for example in corpus.examples:
        by_prompt.setdefault(corpus.responses[example[0]].prompt, []).append(example)
    order = list(by_prompt)
    random.Random(5).shuffle(order)
    examples = [example for prompt in order for example in by_prompt[prompt]]
    assert [tuple(row) for row in shuffled(corpus, seed=5).tolist()] == examples


def test_a_corpus_on_the_disk_is_the_one_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_SPILL", 4)
    rows = [pair(number) for number in range(20)]
    there, here = corpus_of_pairs(rows, tmp_path), corpus_of_pairs(rows)
    assert there == here and there.longest == here.longest == 14 and not any(tmp_path.iterdir())
    a, b = (collate(corpus, corpus.examples[3:6]) for corpus in (there, here))
    same = {name: torch.equal if isinstance(value, torch.Tensor) else eq for name, value in vars(b).items()}
    assert all(same[name](getattr(a, name), value) for name, value in vars(b).items())
    assert there.names_of([(4, 5), (0, 1), (4, 5)]) == ["train.jsonl:2", "train.jsonl:0"]
    assert Examples(there, TrainConfig(learning_rate=1, per_device_train_batch_size=2)).names_of((0, 1)) == [
        there.names_of([tuple(example)])[0] for example in shuffled(here, 0)[:2].tolist()
    ]


def test_other_weights_of_tokens_are_another_corpus(monkeypatch):
    said = []
    monkeypatch.setattr("allo_fast.ranks.world_size", lambda: 2)
    monkeypatch.setattr("allo_fast.ranks.agree", said.append)
    for weight in (0.5, 0.5, 0.25):
        weights = Ragged("f")
        weights.append([weight, 1.0])
        corpus = Corpus()
        corpus.examples.append(tuple(corpus.add([1], [[2, 3]])))
        Examples(corpus, TrainConfig(learning_rate=1), token_weights=weights)
    assert said[0] == said[1] != said[2]


def test_reference_log_probabilities_are_computed_once(tmp_path, monkeypatch, caplog):
    """By content: of what is damaged, lost, another model's or not there yet nothing else is computed again."""
    monkeypatch.setattr("allo_fast.training.reference._PART_NUMBERS", 10)
    corpus, computed = pair_corpus(), []
    asked = np.arange(len(corpus.responses))

    def value(tokens):
        return [token + 0.5 for token in tokens]

    def compute(batch):
        computed.extend(batch.responses.tolist())
        return batch.layout(batch.targets + 0.5)

    def logps(mark="a", most=9, corpus=corpus, asked=asked):
        """The reference, and how many responses were computed for it; None where it ends after `most` micro-batches."""
        computed.clear()
        opened = nullcontext(Opened(compute, Layout(), torch.device("cpu")))
        work = reference_logps(tmp_path / "cache", mark, corpus, asked, opened, budget=30)
        try:
            for _ in range(most):
                next(work)
        except StopIteration as end:
            return end.value, len(computed)

    def files():
        return sorted((tmp_path / "cache").iterdir())

    assert logps(most=3) is None
    whole = len(files())
    reference, count = logps()
    assert 0 < whole < len(files()) and 0 < count < len(asked), "what was written before is not computed again"
    assert reference == [value(response.tokens) for response in corpus.responses]
    assert logps()[1] == 0
    turn_a_bit(files()[1])
    reference, count = logps()
    assert 0 < count < len(asked) and f"{files()[1]}: damaged" in caplog.text
    assert reference == [value(response.tokens) for response in corpus.responses] and logps()[1] == 0
    files()[2].unlink()
    assert 0 < logps()[1] < len(asked)
    other = Corpus()
    known = corpus.responses[3]
    other.add([1, 2], [known.tokens])
    other.add(corpus.prompts[known.prompt], [known.tokens, [5, 6, 7], known.tokens])
    reference, count = logps(corpus=other, asked=np.arange(4))
    assert count == 2, "the same tokens behind another prompt are something else, and twice the same are one"
    assert reference == [value(tokens) for tokens in (known.tokens, known.tokens, [5, 6, 7], known.tokens)]
    caplog.clear()
    assert logps(mark="b")[1] == len(asked)
    assert "of another model or another way of computing" in caplog.text


def test_a_killed_reference_goes_on_with_the_passes_that_it_would_have_made(tmp_path, monkeypatch):
    """What a pass gives depends on what else is in it, in its last bits; here on which responses."""
    monkeypatch.setattr("allo_fast.training.reference._PART_NUMBERS", 0)
    monkeypatch.setattr("allo_fast.training.reference._WINDOW", 7)
    corpus, asked = pair_corpus(problems=12), np.arange(24)

    def compute(batch):
        return batch.layout(batch.targets.float()) + batch.responses.sum()

    def run(folder, asked=asked, most=99) -> list | None:
        opened = nullcontext(Opened(compute, Layout(packed=True), torch.device("cpu")))
        work = reference_logps(folder, "a", corpus, asked, opened, budget=30)
        try:
            for _ in range(most):
                next(work)
        except StopIteration as end:
            return [end.value[number] for number in asked.tolist()]

    for known in ([], [2, 5, 6, 7]):  # that another stage computed
        whole = tmp_path / f"whole-{len(known)}"
        if known:
            run(whole, np.array(known))
        (first := tmp_path / f"first-{len(known)}").mkdir()
        expected = run(whole)
        for most in range(1, 7):
            folder = first / str(most)
            if known:
                run(folder, np.array(known))
            run(folder, most=most)
            assert run(folder) == expected
            sorted(folder.iterdir())[-1].unlink()
            assert run(folder) == expected


def test_obstacles_in_a_reference_s_folder(tmp_path):
    corpus, asked = pair_corpus(), np.arange(4)
    (tmp_path / "cache/reference-00000.safetensors").mkdir(parents=True)
    (left := tmp_path / "cache/.reference-00007.safetensors.partial").mkdir()

    def compute(batch, remove=False):
        if remove:
            for file in tmp_path.glob("cache/*1.safetensors"):
                file.unlink()
        return batch.layout(batch.targets.float())

    def run(compute):
        opened = nullcontext(Opened(compute, Layout(packed=True), torch.device("cpu")))
        work = reference_logps(tmp_path / "cache", "a", corpus, asked, opened, budget=30)
        for _ in work:
            pass

    run(compute)
    assert not left.exists() and (tmp_path / "cache/reference-00001.safetensors").is_file()
    asked = np.arange(len(corpus.responses))
    with pytest.raises(UserError, match="cache: files were removed while they were needed"):
        run(partial(compute, remove=True))
    run(compute)


def test_two_commands_compute_references_one_after_the_other(tmp_path):
    corpus, asked, computed = pair_corpus(), np.arange(6), []

    def compute(batch):
        computed.append(batch)
        return batch.layout(batch.targets.float())

    def run():
        opened = nullcontext(Opened(compute, Layout(packed=True), torch.device("cpu")))
        deque(reference_logps(tmp_path / "cache", "a", corpus, asked, opened, budget=30), maxlen=0)

    with locked(tmp_path / ".cache.lock"):
        second = Thread(target=run)
        second.start()
        second.join(1)
        assert second.is_alive() and not computed
    second.join(10)
    count = len(computed)
    run()
    assert len(computed) == count > 0, "what the other has computed is there"


def test_what_decides_log_probabilities_is_in_the_mark(tmp_path, monkeypatch):
    """More than weights: settings that change what is computed with them, buffers, dtype and layout."""
    model = tiny_llama()
    marks = [
        described(model, fingerprint(model), Layout()),
        described(model, fingerprint(model), Layout(packed=True)),
        described(model, fingerprint(model), Layout(), torch.bfloat16),
    ]
    model.register_buffer("correction", torch.zeros(2))
    marks.append(described(model, fingerprint(model), Layout()))
    model.config.rms_norm_eps *= 2
    marks.append(described(model, fingerprint(model), Layout()))
    assert len(set(marks)) == len(marks)
    with monkeypatch.context() as patch:
        patch.setattr("allo_fast.training.reference.as_bytes", None)
        described(tiny_llama(tie_word_embeddings=True), "", Layout())  # its head is no buffer
    model.config._name_or_path = "elsewhere"
    assert described(model, fingerprint(model), Layout()) == marks[-1]
    (tmp_path / "cache").write_text("in the way")
    asked, opened = np.arange(1), nullcontext(Opened(lambda batch: batch.valid.float(), Layout(), torch.device("cpu")))
    with pytest.raises(UserError, match="cache/a: cannot be written"):
        list(reference_logps(tmp_path / "cache" / "a", "a", pair_corpus(), asked, opened))


def turn_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def pair(number: int) -> dict:
    """Of 14 tokens."""
    ids = {"prompt_ids": [5] * 8, "chosen_ids": [6, number, 7, 8, 9, 2], "rejected_ids": [7, number, 2]}
    return {"id": f"train.jsonl:{number}", "prompt": "p" * 100, "chosen": "c" * 90, "rejected": "r" * 80, **ids}


class Constant:
    """Prompts that make the same tokens of everything, in no time."""

    chat = False

    def encode(self, prompt, turns, tools):
        return [5] * 8, [[6, 7, 8, 9, place, 2] for place, _ in enumerate(turns)]


def write_all(folder, count):
    """A run's rows up to rewards."""
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for number in range(count):
            row = {name: f"{name} {number} " * 9 for name in ("prompt", "chosen", "rejected")}
            file.write(json.dumps(row) + "\n")
    paired = [pair(number) for number in range(count)]
    judged = [
        {"id": row["id"], "prompt": "p" * 100, "prompt_ids": [5] * 8, "solution": "s"}
        | {"responses": [{"text": "t" * 80, "ids": row[ids], "correct": ids == "chosen_ids"} for ids in TURNS]}
        for row in paired
    ]
    write_jsonl(folder / "responses.jsonl", judged)
    write_jsonl(folder / "pairs.jsonl", paired)
    about = [{"id": row["id"], "prompt_ids": [5] * 8, "response_ids": row["rejected_ids"]} for row in paired]
    write_jsonl(folder / "rewards.jsonl", [{**row, "rewards": [0.1, 0.6, 0.7]} for row in about])


TURNS = "chosen_ids", "rejected_ids"
STAGES = {
    "sample": lambda unit: problems.unit_problems(unit, "train", Constant(), 1),
    "pairs": lambda unit: list(pairs.execute(unit)),
    "learn": lambda unit: Examples(
        corpus_of_pairs(read_jsonl(unit.folder / "pairs.jsonl"), unit.folder), unit.config.learn
    ).collate((0,)),
    "rewards": lambda unit: rendered_once(unit, "wrong.jsonl", lambda: responses.wrong_responses(unit)),
    "forget": lambda unit: forget.weighted_corpus(read_jsonl(unit.folder / "rewards.jsonl"), 0.5, unit.folder),
}


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory):
    folders = {count: tmp_path_factory.mktemp("scale") / str(count) for count in (300, 1300)}
    for count, folder in folders.items():
        write_all(folder, count)
    return folders


@pytest.mark.parametrize("stage", STAGES)
def test_memory_hardly_grows_with_rows(two_sizes, monkeypatch, stage):
    """Bytes, not times: a row that was kept would take more than a thousand."""
    monkeypatch.setattr(arrays, "_SPILL", 100)
    monkeypatch.setattr("allo_fast.runs.rows._CHUNK", 100)
    for module in ("runs.rows", "journal"):
        monkeypatch.setattr(f"allo_fast.{module}._BLOCK", 1 << 12)
    monkeypatch.setattr(problems, "limits", lambda *given: Limits(99, 99, 1, 999, 999))
    small, large = two_sizes.values()
    STAGES[stage](unit(small))  # imports what it imports
    peaks = []
    for folder in (small, large):
        (folder / "problems.jsonl").unlink(missing_ok=True)
        (folder / "wrong.jsonl").unlink(missing_ok=True)
        tracemalloc.start()
        STAGES[stage](unit(folder))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 100 * 1000
