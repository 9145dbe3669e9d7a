"""Every layout of preference rows that is in wide use, read as one conversation; and what is set aside."""

import json

import numpy as np
import pytest
from conftest import read_problems

from allo_fast.config import UserError
from allo_fast.data.preferences import read_preference
from allo_fast.data.sources import UnusableRow

S, Q, A, B = "Be kind.", "How hot?", "Hot.", "Cold."


def said(*texts, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": S}
TOOLS = [{"type": "function", "function": {"name": "heat", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "heat", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "230"}
HH = "\n\nHuman: How?\n\nAssistant: Well.\n\nHuman: How hot?\n\nAssistant:"
LONG = said("How?", "Well.", Q)
SIDES = {"chosen": A, "rejected": B}
BASE = {"prompt": Q, **SIDES}

# Layout -> row, prompt. Chosen is A and rejected is B in all of them.
LAYOUTS = {
    "texts": ({"prompt": Q, "chosen": A, "rejected": B}, Q),
    "system": ({"system": S, "prompt": Q, "chosen": A, "rejected": B}, [SYSTEM, *said(Q)]),
    "orca": ({"system": "", "question": Q, "chosen": A, "rejected": B}, Q),
    "orca-system": ({"system": S, "question": Q, "chosen": A, "rejected": B}, [SYSTEM, *said(Q)]),
    "distilabel": ({"system": S, "input": Q, "chosen": A, "rejected": B}, [SYSTEM, *said(Q)]),
    "alpaca": ({"instruction": "How", "input": "hot?", "chosen": A, "rejected": B}, "How\nhot?"),
    "alpaca without input": ({"instruction": Q, "input": "", "chosen": A, "rejected": B}, Q),
    "empty context": ({"prompt": Q, "history": [], "context": None, "chosen": A, "rejected": B}, Q),
    "empty prompt, which the responses have": (
        {"prompt": "", "chosen": said(Q, A), "rejected": said(Q, B)},
        said(Q),
    ),
    "history": ({"instruction": Q, "history": [["How?", "Well."]], "chosen": A, "rejected": B}, LONG),
    "messages": (
        {"prompt": said(Q), "chosen": said(A, first="assistant"), "rejected": said(B, first="assistant")},
        said(Q),
    ),
    "system-and-messages": ({"system": S, "prompt": LONG, "chosen": A, "rejected": B}, [SYSTEM, *LONG]),
    "capybara": (
        {"chosen": [*LONG, *said(A, first="assistant")], "rejected": [*LONG, *said(B, first="assistant")]},
        LONG,
    ),
    "binarized": (
        {"prompt": Q, "chosen": said(Q, A), "rejected": said(Q, B), "messages": said(Q, A), "score": 1},
        said(Q),
    ),
    "last-question": (
        {"prompt": Q, "chosen": [*LONG, *said(A, first="assistant")], "rejected": [*LONG, *said(B, first="assistant")]},
        LONG,
    ),
    "system-outside": ({"system": S, "prompt": Q, "chosen": said(Q, A), "rejected": said(Q, B)}, [SYSTEM, *said(Q)]),
    "json": ({"chosen": json.dumps(said(Q, A)), "rejected": json.dumps(said(Q, B))}, said(Q)),
    "json-prompt": ({"prompt": json.dumps(said(Q)), "chosen": A, "rejected": B}, said(Q)),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": A},
            "rejected": {"from": "gpt", "value": B},
        },
        said(Q),
    ),
    "swift": ({"messages": said(Q, A), "rejected_response": B}, said(Q)),
    "chat-api": (
        {
            "input": {"messages": said(Q), "tools": [], "parallel_tool_calls": True},
            "preferred_output": said(A, first="assistant"),
            "non_preferred_output": said(B, first="assistant"),
        },
        said(Q),
    ),
    "hh": ({"chosen": f"{HH} {A}", "rejected": f"{HH} {B}"}, LONG),
    "hh-prompt": ({"prompt": HH, "chosen": f" {A}", "rejected": f" {B}"}, LONG),
    "shp": ({"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 1}, Q),
    "shp-swapped": ({"history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0}, Q),
    "safe": ({"prompt": Q, "response_0": B, "response_1": A, "better_response_id": 1, "safer_response_id": 0}, Q),
    "stack": ({"question": Q, "response_j": A, "response_k": B}, Q),
    "helpsteer": ({"context": said(Q), "response1": B, "response2": A, "overall_preference": 2}, said(Q)),
    "arena": ({"conversation_a": said(Q, A), "conversation_b": said(Q, B), "winner": "model_a"}, said(Q)),
    "beginning": ({"chosen": f"Say it: {A}", "rejected": f"Say it: {B}"}, "Say it:"),
    "scores": ({"prompt": Q, "responses": [B, A], "scores": [1.0, 2.0]}, Q),
    "ranks": ({"prompt": Q, "answers": [{"answer": A, "rank": 1}, {"answer": B, "rank": 2}]}, Q),
    "ultrafeedback": (
        {"instruction": Q, "completions": [{"response": B, "overall_score": 3}, {"response": A, "overall_score": 9}]},
        Q,
    ),
    "tools": (
        {"prompt": [*said(Q), CALL, RESULT], "chosen": A, "rejected": B, "tools": TOOLS},
        [*said(Q), CALL, RESULT],
    ),
    "prefilled": ({"prompt": said(Q, "It is"), "chosen": A, "rejected": B}, said(Q, "It is")),
    "system-and-conversations": ({"system": S, "chosen": said(Q, A), "rejected": said(Q, B)}, [SYSTEM, *said(Q)]),
    "responses": ({"prompt": Q, "chosen_response": A, "rejected_response": B}, Q),
    "parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("How", " hot?")]}], **SIDES},
        said(Q),
    ),
    "empty-system": ({"prompt": [{"role": "system", "content": ""}, *said(Q)], "chosen": A, "rejected": B}, None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    row, prompt = LAYOUTS[name]
    read = read_preference(row)
    if prompt is not None:
        assert read.prompt == prompt
    strip = [turn.strip() for turn in (*read.right, *read.wrong)]
    assert strip == [A, B]
    assert read.tools == (TOOLS if name == "tools" else None)


def test_a_transcript_is_given_back_to_base_models():
    read = read_preference(LAYOUTS["hh"][0])
    assert read.plain_prompt == HH and read.right == (A,)
    assert read_preference(LAYOUTS["messages"][0]).plain_prompt is None
    framed = f"You are kind.{HH}"
    assert read_preference({"prompt": framed, "chosen": f" {A}", "rejected": f" {B}"}).plain_prompt == framed
    begun = read_preference({"prompt": f"{HH} It is", "chosen": f" {A}", "rejected": f" {B}"})
    assert begun.prompt[-1] == {"role": "assistant", "content": "It is"} and begun.plain_prompt == f"{HH} It is"
    assert begun.right == (f" {A}",), "an answer that is begun goes on with its space"
    assert read_preference({"system": S, "prompt": HH, "chosen": A, "rejected": B}).plain_prompt is None


def test_an_answer_may_be_a_dialogue_or_json():
    dialogue = "Human: Hi\n\nAssistant: Hello"
    assert read_preference({"prompt": "Write one.", "chosen": dialogue, "rejected": B}).right == (dialogue,)
    for answer in ('{"from": "Paris", "to": "Rome"}', '{"role": "admin"}', "[1, 2]"):
        assert read_preference({"prompt": "As JSON?", "chosen": answer, "rejected": B}).right == (answer,)


def test_an_answer_of_brackets_is_a_text():
    for brackets in ("[" * 100_000, '{"role": ' * 100 + "1" + "}" * 100):
        assert read_preference({**BASE, "chosen": brackets}).right == (brackets,)


def test_cells_of_tables_are_texts():
    assert read_preference({"prompt": Q, "response_0": B, "response_1": A, "better_response_id": "1"}).right == (A,)
    assert read_preference({"prompt": Q, "responses": [B, A], "scores": ["3", "10.5"]}).right == (A,)
    columns = {"role": ["user", "assistant"], "content": [Q, A]}
    assert read_preference({"chosen": columns, "rejected": said(Q, B)}).right == (A,)


@pytest.mark.parametrize("form", [list, np.array, lambda messages: messages[0]], ids=["list", "array", "dict"])
@pytest.mark.parametrize("key", BASE)
def test_messages_as_python_prints_them(form, key):
    messages = said(*("x", "it's") * 2, first="user" if key == "prompt" else "assistant")
    with pytest.raises(UnusableRow, match=f"{key}: messages as Python prints them"):
        read_preference({**BASE, key: str(form(messages))})
    for answer in ("{'role': 'admin', 'content': 'x'}", "Say [{'role': 'user', 'content': 'x'}].", "{'a': 1}"):
        assert read_preference({**BASE, "chosen": answer}).right == (answer,)


def test_several_responses():
    read = read_preference({"prompt": Q, "chosen": A, "rejected": [B, "Ice.", B]})
    assert (read.right, read.wrong) == ((A,), (B, "Ice."))
    ties = {"prompt": Q, "completions": ["a", "b", "c", "d"], "ratings": [2, 5, 5, 1]}
    assert read_preference(ties).right == ("b", "c") and read_preference(ties).wrong == ("a", "d")
    whole = read_preference({"chosen": said(Q, A), "rejected": [said(Q, B), said(Q, "Ice.")]})
    assert whole.prompt == said(Q) and whole.wrong == (B, "Ice.")


def test_a_call_is_a_response():
    read = read_preference({"prompt": Q, "chosen": [CALL], "rejected": B, "tools": json.dumps(TOOLS)})
    assert read.right == (CALL,) and read.wrong == (B,) and read.tools == TOOLS


def test_what_is_said_about_a_message_is_no_part_of_it():
    about = [{**message, "timestamp": 5, "weight": 1.0} for message in said(Q, A)]
    read = read_preference({"chosen": about, "rejected": [{**m, "timestamp": 6} for m in said(Q, B)]})
    assert read.prompt == said(Q) and read.right == (A,) and read.wrong == (B,)
    thought = {"role": "assistant", "content": A, "reasoning_content": "Summer."}
    assert read_preference({"prompt": Q, "chosen": [thought], "rejected": B}).right == (thought,)


ASIDE = {
    "role": (
        {**BASE, "prompt": [{"role": "narrator", "content": "x"}]},
        "expected a role out of system, .* got 'narrator'",
    ),
    "last is the user's": ({**BASE, "chosen": said(Q, A, "Thanks!")}, "chosen: the last message is the user's"),
    "contexts": ({"chosen": said(Q, A), "rejected": said("Why?", B)}, "answer different contexts"),
    "earlier turns": ({"chosen": said("x", "y", Q, A), "rejected": said("x", "z", Q, B)}, "different contexts"),
    "another prompt": (
        {**BASE, "chosen": said("Why?", A), "rejected": said("Why?", B)},
        "its conversation is not the prompt's",
    ),
    "unread": (
        {**BASE, "context": "The oven is on."},
        "context: looks like context, and is not read beside chosen, prompt",
    ),
    "misspelt": ({**BASE, "sytem": "Be brief."}, "'sytem', not 'system': looks like context"),
    "one of several": ({**BASE, "instructions": "Be brief."}, "'instructions', not 'instruction': looks like context"),
    "a list misspelt": ({**BASE, "contexts": ["x"]}, "'contexts', not 'context': looks like context"),
    "a persona": ({**BASE, "persona": "A cook."}, "persona: looks like context"),
    "two systems": (
        {**BASE, "system": "Be brief.", "prompt": [{"role": "system", "content": S}, *said(Q)]},
        "a system text beside another one",
    ),
    "documents": ({**BASE, "documents": ["x"]}, "documents: looks like context"),
    "a transcript's last turn is the user's": (
        {"chosen": f"{HH} {A}", "rejected": f"{HH} {B}\n\nHuman: Why?"},
        "rejected: the last message is the user's",
    ),
    "a transcript without an answer": ({"chosen": f"{HH} {A}", "rejected": HH}, "rejected: expected a text, got ''"),
    "a transcript with an empty turn": (
        {"chosen": f"\n\nHuman:{HH} {A}", "rejected": f"\n\nHuman:{HH} {B}"},
        "chosen: an empty turn in",
    ),
    "history that is a text": (
        {"instruction": Q, "history": "User: hi", "chosen": A, "rejected": B},
        "history: expected pairs or messages",
    ),
    "arguments of the template": (
        {**BASE, "chat_template_kwargs": {"x": 1}},
        "chat_template_kwargs: looks like context",
    ),
    "a role that is no text": (
        {**BASE, "prompt": [{"role": ["user"], "content": Q}]},
        r"expected a role .* got \['user'\]",
    ),
    "all alike": ({"prompt": Q, "responses": [A, B], "scores": [3, 3]}, "scores: all are rated 3"),
    "pictures": ({**BASE, "images": ["x.png"]}, "images: looks like context"),
    "a picture": (
        {**BASE, "prompt": [{**said(Q)[0], "image": "x.png"}]},
        "prompt: image in a message; texts alone are read",
    ),
    "functions": ({**BASE, "functions": ["x"]}, "functions: looks like context"),
    "two prompts": ({**BASE, "question": "Why?"}, "question: looks like context"),
    "equal": ({**BASE, "rejected": A}, "chosen and rejected are equal"),
    "equal but for the end": ({**BASE, "rejected": f"{A} \n"}, "equal, but for white space at the end"),
    "equal messages": (
        {**BASE, "chosen": [{**said(A, first="assistant")[0], "content": f"{A}\t"}], "rejected": A},
        "equal, but for white space at the end",
    ),
    "equal calls": ({**BASE, "chosen": [CALL], "rejected": [{**CALL, "content": " "}]}, "equal, but for white space"),
    "both": ({**BASE, "rejected": [B, A]}, "both chosen and rejected: 'Hot.'"),
    "surrogate in a text": ({**BASE, "prompt": "Good? \ud83d"}, "prompt: half a character"),
    "surrogate in messages": ({**BASE, "chosen": said(Q, "Yes \ude0a")}, "chosen: half a character"),
    "no prompt": (
        {"chosen": A, "rejected": B},
        "no field 'prompt', and chosen and rejected begin with nothing in common",
    ),
    "empty prompt": (
        {"prompt": "", "chosen": "It is hot.", "rejected": "It is cold."},
        "prompt: empty; leave the field",
    ),
    "no prompt's text": ({"prompt": None, "chosen": "It is hot.", "rejected": "It is cold."}, "prompt: empty; leave"),
    "a system text alone": ({**BASE, "prompt": [], "system": "Short."}, "prompt: empty"),
    "no rejected": ({"prompt": Q, "chosen": A}, "no field 'rejected'"),
    "no responses": ({"prompt": Q, "text": A}, r"no field 'chosen'; it has \['prompt', 'text'\]"),
    "verdict": (
        {"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 7},
        "better_response_id: expected one of",
    ),
    "tie": (
        {"context": Q, "response1": A, "response2": B, "overall_preference": 0},
        "overall_preference: expected one of",
    ),
    "unrated": ({"prompt": Q, "responses": [A, B]}, "responses: expected a rating of each"),
    "rating": ({"prompt": Q, "responses": [A, B], "scores": [1, None]}, "scores: expected numbers"),
    "label": ({"prompt": Q, "completion": A, "label": "maybe"}, "label: expected true or false"),
    "tools": ({**BASE, "tools": "{"}, "tools: not JSON"),
    "nested tools": ({**BASE, "tools": "[" * 100_000}, "tools: nested more than 50 deep"),
    **{
        f"tools {tools!r}": ({**BASE, "tools": tools}, "tools: expected a list of objects whose names are texts, got ")
        for tools in (5, [5], [{"function": 5}], [{"name": 5}], {"a": 1}, "5")
    },
    **{
        f"calls {calls!r}": ({**BASE, "chosen": [{**CALL, "tool_calls": calls}]}, "chosen: tool_calls: expected a list")
        for calls in (5, "heat", ["heat"], [{"function": "heat"}], [{"function": {"name": 1}}])
    },
    "a user's calls": ({**BASE, "prompt": [{**said(Q)[0], "tool_calls": 5}]}, "prompt: tool_calls: expected a list"),
    "thoughts": ({**BASE, "chosen": [{**said(A, first="assistant")[0], "thinking": 5}]}, "thinking: expected a text"),
    "a column that is no list": ({**BASE, "prompt": {"role": ["user"], "content": Q}}, "expected a role out of"),
    "columns of unlike length": ({**BASE, "prompt": {"role": ["user"], "content": [Q, A]}}, "expected a role out of"),
    "no content": (
        {**BASE, "prompt": [{"role": "user"}]},
        "expected a text as content of the user's message, got None",
    ),
    "a part": (
        {**BASE, "prompt": [{"role": "user", "content": [{"type": "text", "text": Q}, {"type": "image", "url": "x"}]}]},
        "prompt: a part of a message that is no text: {'type': 'image'.*; texts alone are read",
    ),
    "an empty message": ({**BASE, "prompt": said("")}, "prompt: the user's message is empty"),
    "a number as prompt": ({**BASE, "prompt": 4}, "prompt: expected a text or chat messages, got 4$"),
    "bytes as prompt": ({**BASE, "prompt": b"Why"}, "prompt: expected a text or chat messages, got b'Why'"),
    "columns": ({"prompt": [Q, Q], "chosen": [A, A], "rejected": [B, B]}, "got a list of 2 texts, like a column"),
    "a system text of one response": (
        {
            "prompt": Q,
            "completions": [{"response": A, "score": 2, "custom_system_prompt": S}, {"response": B, "score": 1}],
        },
        "completions: custom_system_prompt of one response: looks like context, and is not read",
    ),
    "capitals": ({"prompt": Q, "Chosen": A, "Rejected": B}, "no field 'chosen'; rename 'Chosen' to it; it has "),
    "a space": ({"prompt": Q, "chosen": A, " rejected": B}, "no field 'rejected'; rename ' rejected' to it; it has "),
    "context in capitals": (
        {"Prompt": Q, "chosen": f"{Q} {A}", "rejected": f"{Q} {B}"},
        "'Prompt', not 'prompt': looks like context",
    ),
    "empty": ({**BASE, "rejected": " "}, "rejected: expected a text"),
    "number": ({**BASE, "chosen": 42}, "chosen: expected a text, got 42"),
    "nothing": ({**BASE, "chosen": []}, "expected a text or chat messages, got "),
}


@pytest.mark.parametrize("name", ASIDE)
def test_what_is_set_aside(name):
    row, reason = ASIDE[name]
    with pytest.raises(UnusableRow, match=reason):
        read_preference(row)


def test_judged_completions_are_grouped_by_their_prompt(tmp_path):
    rows = [
        {"prompt": Q, "completion": A, "label": True},
        {"prompt": "Why?", "completion": "So.", "label": False},
        {"prompt": Q, "completion": B, "label": "false"},
        {"prompt": Q, "completion": "Ice.", "label": 0},
        {"prompt": Q, "completion": f"{A}\n", "label": False},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (problem,), (alone,) = read_problems(str(path), "preference")
    assert (problem.id, problem.right, problem.wrong) == ("rows.jsonl:1", (A,), (B, "Ice."))
    assert alone.id == "rows.jsonl:2" and "its prompt has no right completion" in alone.reason
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": Q, "chosen": A, "rejected": B}])))
    assert [problem.id for problem in read_problems(str(path), "preference")[0]] == ["rows.jsonl:6", "rows.jsonl:1"]
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="no usable row; .*no wrong completion"):
        read_problems(str(path), "preference")


@pytest.mark.parametrize(
    "name", ["instruction_id", "prompt_id", "source_document_id", "particle", "source", "language", "weighted"]
)
def test_what_is_about_a_row_is_no_context(name):
    assert read_preference({**BASE, name: "x"}) == read_preference(BASE)
    assert read_preference({**BASE, "documents_": 5}) == read_preference(BASE), "a number says nothing"
