"""Rows and files of data that are not what they should be: read, set aside with the reason, or refused in one line."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass

from transformers import GPT2Config, GPT2LMHeadModel

from tests.drills.drill import drill, table
from tests.drills.injector import fault, library, reason
from tests.drills.jobs import ignore_case, pair, write_model
from tests.drills.lab import Lab, Verdict
from tests.drills.run import CONFIG, PAIRS, REWARDS, SAMPLE
from tests.tiny import byte_level

DATA = "Data"


@dataclass(frozen=True)
class Case:
    """A file of training data, and how many of its rows are usable: one of these."""

    data: bytes
    usable: tuple[int, ...]


def rows(*more: object, usable: int | tuple[int, ...] = 4, ensure_ascii: bool = True) -> Case:
    """Four good rows, and between them `more`: objects, or lines as they are."""
    lines = [json.dumps(pair(number)).encode() for number in range(4)]
    extra = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=ensure_ascii).encode() for row in more]
    counts = usable if isinstance(usable, tuple) else (usable,)
    return Case(b"\n".join([*lines[:2], *extra, *lines[2:]]) + b"\n", counts)


def counted(lab: Lab, case: Case, *settings: str) -> Verdict:
    """Every row is used or set aside with a reason, as many as should be; or the file is refused in one line."""
    (lab.folder / "train.jsonl").write_bytes(case.data)

    def wrong(done) -> str:
        used, aside = ((lab.run / SAMPLE / f"{name}.jsonl").read_text() for name in ("responses", "quarantine"))
        count = used.count("\n")
        if count not in case.usable:
            return f"{count} rows are used"
        return "" if all(json.loads(line)["reason"] for line in aside.splitlines()) else "set aside without a reason"

    verdict = lab.judged(wrong, "sample", CONFIG, *settings, refusal=True)
    aside = lab.run / SAMPLE / "quarantine.jsonl"
    if verdict.grade != "good" or not aside.exists():
        return verdict
    reasons = [json.loads(line)["reason"] for line in aside.read_text().splitlines()]
    return Verdict("good", ": ".join([f"{len(reasons)} set aside", *(reason[:120] for reason in reasons[:1])]))


CHAT_PAIR = {
    "prompt": [{"role": "user", "content": "Is 9 even?"}],
    "chosen": [{"role": "assistant", "content": "No."}],
    "rejected": [{"role": "assistant", "content": "Bread."}],
}
IMAGE = [{"role": "user", "content": [{"type": "image", "url": "x.png"}, {"type": "text", "text": "Is it?"}]}]
USER_TURN = [{"role": "user", "content": "Is 9 even?"}, {"role": "user", "content": "Say."}]
plain = rows().data
CSV = b"prompt,chosen,rejected\n" + b"".join(b"Is %d even?,Yes.,Bread.\n" % number for number in range(5))
NESTED = b'{"prompt": "x", "chosen": "y", "rejected": "z", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
table(
    DATA,
    "preferences",
    counted,
    {
        "empty text": {"chosen": rows(pair(9, chosen="")), "prompt": rows(pair(9, prompt=""))},
        "null row": rows(None),
        "null field": {key: rows(pair(9, **{key: None})) for key in ("prompt", "chosen", "rejected")},
        "blank lines": rows(b"", b"   ", b""),
        "chosen = rejected": rows(pair(9, chosen="Bread.")),
        "over-long row": rows(pair(9, chosen="Yes. " * 400)),
        "number for a row": rows(5),
        "missing key": {key: rows({k: v for k, v in pair(9).items() if k != key}) for key in pair(9)},
        "5000-digit integer": rows(b'{"prompt": %s, "chosen": "a", "rejected": "b"}' % (b"7" * 5000)),
        "NaN": rows(pair(9, chosen=float("nan"))),
        "torn last line": Case(plain[:-12], (3,)),
        "no final newline": Case(plain[:-1], (4,)),
        "BOM": Case(b"\xef\xbb\xbf" + plain, (4,)),
        "CRLF": Case(plain.replace(b"\n", b"\r\n"), (4,)),
        "CR only": Case(plain.replace(b"\n", b"\r"), (4,)),
        "NUL bytes": rows(b'{"prompt": "a\x00b", "chosen": "a", "rejected": "b"}', bytes(20)),
        "invalid UTF-8": rows(b'{"prompt": "a\xff\xfe", "chosen": "a", "rejected": "b"}'),
        "U+2028, NEL": rows(pair(9, prompt="a\u2028b\u0085c"), usable=5, ensure_ascii=False),
        "JSON array": Case(b"[" + b",".join(plain.splitlines()) + b"]", (4,)),
        "JSON array, pretty": Case(json.dumps([pair(n) for n in range(4)], indent=2).encode(), (4,)),
        "empty file": Case(b"", ()),
        "blank file": Case(b"\n \n\n", ()),
        "multimodal content": rows(CHAT_PAIR | {"prompt": IMAGE}),
        "chosen = rejected but for trailing spaces": rows(pair(9, chosen="Bread.  ")),
        "chosen ends with a user turn": rows(CHAT_PAIR | {"chosen": USER_TURN}),
        "duplicate JSON keys": rows(b'{"prompt": "a", "chosen": "x", "chosen": "b", "rejected": "c"}'),
        "UTF-16 file": Case(plain.decode().encode("utf-16"), (4,)),
        "gzip under another name": Case(gzip.compress(plain), (4,)),
        "one lone surrogate": rows(b'{"prompt": "a \\ud800", "chosen": "a", "rejected": "b"}'),
        "one deeply nested row": rows(NESTED, usable=(4, 5)),
        "one chat row, no template": rows(CHAT_PAIR),
        "numbers for texts": rows(pair(9, chosen=7, rejected=8)),
    },
)
table(DATA, "preferences", counted, {"5 MB line": rows(pair(9, chosen="Yes. " * 1_000_000))})
table(DATA, "preferences", lambda lab, data: tabular(lab, "train.csv", data), {"CSV": CSV})
table(
    DATA,
    "chat",
    counted,
    {
        "one row the chat template refuses": rows(
            CHAT_PAIR | {"prompt": [{"role": "system", "content": "Be kind."}, *CHAT_PAIR["prompt"]]}
        )
    },
)


def tabular(lab: Lab, name: str, data: bytes) -> Verdict:
    (lab.folder / name).write_bytes(data)
    return counted(lab, Case(b"", (5,)), f"data.train={name}")


@drill(DATA, "chosen, rejected equal as tokens", "preferences")
def same_tokens(lab: Lab) -> Verdict:
    """A tokenizer that normalizes: other texts, the same tokens."""
    ignore_case(lab.folder / "base")
    return counted(lab, rows(pair(9, chosen="bread.", rejected="BREAD.")))


def source(lab: Lab, name: str) -> Verdict:
    return lab.refused("sample", CONFIG, f"data.train={name}")


table(DATA, "preferences", source, {"directory": "base", "slice [:-2]": "train.jsonl[:-2]"})


def problems(lab: Lab, case: Case) -> Verdict:
    return counted(lab, case, "data.format=problems", "sample.max_new_tokens=4")


def problem(number: int, **changes: object) -> bytes:
    row = {"problem": f"{number}+1", "solution": f"The answer is {number + 1}", "answer": f"{number + 1}"} | changes
    return json.dumps(row).encode() + b"\n"


table(
    DATA,
    "preferences",
    problems,
    {"numeric answers": Case(b"".join(problem(number, answer=number + 1) for number in range(4)), (4,))},
)


@drill(DATA, "solution is a number (multiple_choice)", "preferences")
def number_for_a_solution(lab: Lab) -> Verdict:
    choices = {"problem": "1+1\nOptions:\n1\n2\n3", "answer": "2"}
    data = [json.dumps(choices | changes).encode() for changes in ({}, {}, {"solution": 2}, {})]
    return counted(lab, Case(b"\n".join(data) + b"\n", (3, 4)), "data.format=multiple_choice")


def short_model(lab: Lab, positions: int) -> Verdict:
    write_model(lab.folder / "base", byte_level(eos="<eos>"), max_position_embeddings=positions)
    (lab.folder / "train.jsonl").write_bytes(b"".join(problem(number) for number in range(4)))
    settings = ["data.format=problems", "data.prompt_template='{}='", "sample.max_new_tokens=100"]
    return lab.refused("sample", CONFIG, *settings)


@drill(DATA, "GPT-2 of 40 positions, 60 new tokens", "preferences")
def short_gpt2(lab: Lab) -> Verdict:
    tokenizer = byte_level(eos="<eos>")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "vocab_size": len(tokenizer)}
    for path in (lab.folder / "base").iterdir():
        path.unlink()
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)).save_pretrained(
        lab.folder / "base"
    )
    tokenizer.save_pretrained(lab.folder / "base")
    (lab.folder / "train.jsonl").write_bytes(b"".join(problem(number) for number in range(4)))
    settings = ["data.format=problems", "data.prompt_template='{}='", "sample.max_new_tokens=60"]
    return lab.refused("sample", CONFIG, *settings)


table(DATA, "preferences", short_model, {"Llama of 32 positions, 100 new tokens": 32})


@drill(DATA, "every rewriting prompt too long", "fresh")
def long_rewriting(lab: Lab) -> Verdict:
    """Known before anything runs, or in one line later."""
    template = "rewards.template='" + "x" * 600 + "{}{}{}'"
    return lab.refused("run", CONFIG, template, "rivals=[]")


@drill(DATA, "data.train unreadable", "fresh")
def unreadable(lab: Lab) -> Verdict:
    if library() is None:
        return Verdict("skipped", reason)
    return lab.refused("sample", CONFIG, before=fault("deny", 0, lab.folder, "train.jsonl"))


def rewards(lab: Lab, change: Callable[[list[dict]], object]) -> Verdict:
    """A user's own rewards, of the responses of a finished run, with one thing wrong."""
    rows = [json.loads(line) for line in (lab.run / REWARDS / "rewards.jsonl").read_text().splitlines()]
    change(rows)
    (lab.folder / "rewards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["rewards.source=file", "rewards.path=rewards.jsonl", "name=other"]
    for stage in ("sample", "pairs"):
        if (done := lab.allo(stage, CONFIG, *settings)).code:
            return Verdict("good" if done.is_clear else "unclear", done.line)
    return lab.refused("rewards", CONFIG, *settings)


def set_first(**changes: object) -> Callable[[list[dict]], object]:
    return lambda rows: rows[0].update(changes)


table(
    DATA,
    "finished",
    rewards,
    {
        "rewards file: response a list": set_first(response=["a"]),
        "rewards file: NaN": lambda rows: rows[0]["rewards"].__setitem__(0, float("nan")),
        "rewards file: a row missing": lambda rows: rows.pop(),
        "rewards file: a text for a number": set_first(rewards="half"),
        "rewards file: too few": lambda rows: rows[0]["rewards"].pop(),
    },
)


@drill(DATA, "rewards.path missing", "fresh")
def no_rewards(lab: Lab) -> Verdict:
    done = lab.allo("run", CONFIG, "rewards.source=file", "rewards.path=nowhere.jsonl")
    if (lab.run / PAIRS).exists():
        return Verdict("unclear", f"after stages have run: {done.line}")
    return Verdict("good" if done.is_clear else "unclear", done.line)
