"""Trained tokens are the chat template's own, or the row is set aside; over templates of many families."""

import pytest
from tiny import CHATML, FAMILIES, byte_level, family, metaspace, turns
from tokenizers import AddedToken

from allo_fast.config import UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.conversations import THOUGHTS
from allo_fast.data.preferences import read_preference
from allo_fast.data.prompts import INSTRUCTION, Prompts, as_text, turn_text
from allo_fast.data.sources import UnusableRow

SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "How hot is it?"}
ANSWER = {"role": "assistant", "content": "Warm."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "heat", "arguments": {"x": 1}}}]}
CONVERSATIONS = {
    "text": ("How hot is it?", "230 degrees."),
    "spaces": ([USER], " 230 degrees.\n"),
    "system": ([SYSTEM, USER], "Yes."),
    "turns": ([USER, ANSWER, USER], "No, not yet."),
    "begun": ([USER, {"role": "assistant", "content": "It is"}], " hot."),
    "thoughts": ([USER], "<think>\nSummer.\n</think>\n\nYes."),
    "call": ([USER], CALL),
}
# What the templates themselves refuse, leave out, or write in another way when a response follows.
THINKING = dict.fromkeys(["text", "spaces", "system", "turns"], "writes the prompt otherwise when a response follows")
DROPS_THOUGHTS = {"thoughts": "leaves out the response's thoughts"}
ASIDE = {
    "qwq": THINKING | DROPS_THOUGHTS,
    "nemotron-3": THINKING | DROPS_THOUGHTS,
    "deepseek-r1-distill": THINKING | DROPS_THOUGHTS,
    "deepseek-v3": DROPS_THOUGHTS,
    "deepseek-v3.1": DROPS_THOUGHTS,
    "glm-4.5": DROPS_THOUGHTS,
    "gemma": {"system": "refuses it: System role not supported"},
    "mistral-v3": {"system": "refuses it: System role not supported"},
    "ignores-the-system": {"system": "leaves out the system's message: 'Be kind.'"},
}
RENDERS_CALLS = ("llama3.1", "gpt-oss")


def whole(tokenizer, context, response):
    """The conversation's tokens, from the template itself."""
    context = [{"role": "user", "content": context}] if isinstance(context, str) else context
    turn = {"role": "assistant", "content": response} if isinstance(response, str) else response
    if context[-1]["role"] == "assistant":
        *context, begun = context
        turn = {**turn, "content": begun["content"] + turn["content"]}
    return tokenizer.apply_chat_template([*context, turn], return_dict=True)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_tokens_are_the_templates_own(name):
    tokenizer = family(name)
    prompts, trained = Prompts(tokenizer), 0
    aside = ASIDE.get(name, {}) | ({} if name in RENDERS_CALLS else {"call": "leaves out a call: 'heat'"})
    for kind, (context, response) in CONVERSATIONS.items():
        if kind in aside:
            with pytest.raises(UnusableRow, match=aside[kind]):
                prompts.encode(context, [response])
            continue
        prompt_ids, (response_ids,) = prompts.encode(context, [response])
        own = whole(tokenizer, context, response)
        trained_ids = prompt_ids + response_ids
        if prompts.frame.closes:
            assert trained_ids == own[: len(trained_ids)], kind
            assert not tokenizer.decode(own[len(trained_ids) :]).strip(), "nothing but white space is left out"
        else:
            assert trained_ids == [*own, tokenizer.eos_token_id], kind
        assert prompt_ids == prompts.encode_prompt(context) and response_ids.count(tokenizer.bos_token_id) == 0
        trained += 1
    assert trained >= 1


def test_there_are_templates_of_35_families():
    assert len(FAMILIES) >= 35


def test_the_templates_arguments_are_the_users():
    prompts = Prompts(family("qwen3"), template_kwargs={"enable_thinking": False})
    prompt, (response,) = prompts.encode("How?", ["So."])
    decode = prompts.tokenizer.decode
    assert decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n") and decode(response) == "So.<|im_end|>"


def test_both_renderings_are_said():
    with pytest.raises(UnusableRow) as said:
        Prompts(family("deepseek-r1-distill")).encode("How?", ["So."])
    assert "<|Assistant|><think>\\n' alone" in str(said.value) and "<|Assistant|>So.<eos>' with it" in str(said.value)


CHAT = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def chatml(eos="<|im_end|>", **more):
    return byte_level(*CHAT, eos=eos, template=CHATML, **more)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", " <|im_end|><|im_end|>", "<|endoftext|>", ""])
def test_a_turn_ends_once(end):
    prompts = Prompts(chatml("<|endoftext|>"))
    assert prompts.tokenizer.decode(prompts.encode_response(f"Hot.{end}")) == "Hot.<|im_end|>"


@pytest.mark.parametrize("special", [True, False])
def test_a_turn_ends_as_the_template_ends_it_whatever_the_tokenizer_says(special):
    tokenizer = byte_level(eos="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in CHAT[:2]])
    tokenizer.chat_template = CHATML
    assert tokenizer.convert_ids_to_tokens(Prompts(tokenizer).encode_response("b")[-1]) == "<|im_end|>"


def test_a_template_may_end_some_turns_otherwise():
    prompts = Prompts(family("llama3.1"))
    ends = [prompts.encode("How?", [turn])[1][0][-1] for turn in ("So.", CALL)]
    assert prompts.tokenizer.convert_ids_to_tokens(ends) == ["<|eot_id|>", "<|eom_id|>"]


@pytest.mark.parametrize(
    "tokenizer, prompt",
    [
        (chatml(), "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"),
        (family("zephyr"), "<|user|>\nHow?<eos>\n<|assistant|>\n"),
        (
            family("llama3"),
            "<|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (family("llama3"), "<bos><|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|>"),
        (family("mistral-v3"), "[INST] How? [/INST]"),
        (family("llama2"), "[INST] How? [/INST]"),
        (family("vicuna"), "USER: How? ASSISTANT:"),
    ],
    ids=["chatml", "zephyr", "llama3", "bos", "mistral", "llama2", "vicuna"],
)
def test_a_text_in_the_chat_format_is_not_wrapped_again(tokenizer, prompt):
    prompts = Prompts(tokenizer)
    assert prompts.encode(prompt, ["So."]) == prompts.encode("How?", ["So."])


# As SmolLM2's: the token that begins every turn is the tokenizer's BOS, the one that ends it its EOS, and who says
# nothing about the system gets one.
OPENED_BY_BOS = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)


def opened_by_bos():
    return byte_level("<|endoftext|>", eos="<|im_end|>", bos="<|im_start|>", template=OPENED_BY_BOS)


@pytest.mark.parametrize("response", ["So.", "So.<|im_end|>", "So.<|im_end|><|endoftext|>"])
@pytest.mark.parametrize("system", ["", "<|im_start|>system\nBe brief.<|im_end|>\n"])
def test_a_bos_that_begins_every_turn(system, response):
    prompts = Prompts(opened_by_bos())
    text = f"{system}<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    prompt, (ids,) = prompts.encode(text, [response])
    assert prompts.tokenizer.decode(prompt) == text and prompts.tokenizer.decode(ids) == "So.<|im_end|>"
    if system:
        assert prompts.encode([{**SYSTEM, "content": "Be brief."}, {"role": "user", "content": "How?"}], ["So."]) == (
            prompt,
            [ids],
        )
    with pytest.raises(UnusableRow, match="already in the chat format, and would be wrapped again"):
        prompts.encode([{"role": "user", "content": text}], ["So."])
    assert "<|im_start|>user\nWhat is <|im_start|>?<|im_end|>" in prompts.tokenizer.decode(
        prompts.encode_prompt("What is <|im_start|>?")
    )


def test_a_bos_that_begins_every_turn_is_a_word_of_a_message():
    prompts = Prompts(opened_by_bos())
    asked = prompts.tokenizer.decode(prompts.encode_prompt("<|im_start|> is what?"))
    assert "user\n<|im_start|> is what?<|im_end|>" in asked


def test_a_conversation_that_was_cut_before_the_space_in_front_of_its_response():
    """Where two texts begin alike, up to a word's end, is where their prompt ends."""
    row = {
        side: f"<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>"
        for side, said in (("chosen", "So."), ("rejected", "No."))
    }
    preference = read_preference(row)
    prompts = Prompts(opened_by_bos())
    encoded = prompts.encode(preference.prompt, [*preference.right, *preference.wrong])
    assert encoded == prompts.encode("<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n", ["So.", "No."])


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_within_a_message(name):
    prompts = Prompts(family(name))
    try:
        within = prompts.render([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    except UnusableRow:
        pytest.skip("renders no such conversation")
    with pytest.raises(UnusableRow, match="a message holds turns of the chat format|already in the chat format"):
        prompts.encode([{"role": "user", "content": f"How? {within} And now?"}], ["So."])


@pytest.mark.parametrize("words", ["What does %s mean?", "%s is what?", "Is it %s"])
def test_a_text_about_the_chat_format_is_wrapped(words):
    for name, mark in (("chatml", "<|im_start|>"), ("mistral-v3", "[INST]"), ("vicuna", "USER:")):
        prompts = Prompts(family(name))
        head = prompts.tokenizer.decode(prompts.encode_prompt("How?")).partition("How?")[0]
        assert prompts.tokenizer.decode(prompts.encode_prompt(words % mark)).startswith(head + words % mark), name


def test_a_begun_answer_in_the_chat_format():
    prompts = Prompts(chatml())
    begun = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nIt is"
    assert prompts.tokenizer.decode(prompts.encode_prompt(begun)) == begun


def test_what_does_not_go_with_a_text_in_the_chat_format():
    prompts, text = Prompts(chatml()), "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(UnusableRow, match="tools do not go with"):
        prompts.encode(text, ["So."], [{"name": "heat"}])
    with pytest.raises(UnusableRow, match="would be wrapped again"):
        prompts.encode([SYSTEM, {"role": "user", "content": text}], ["So."])


def test_a_response_that_goes_on_behind_its_end():
    with pytest.raises(UnusableRow, match=r"goes on behind '<\|im_end\|>'"):
        Prompts(chatml()).encode("How?", ["So.<|im_end|>\n<|im_start|>user\nMore"])


def test_turns_end_once_in_templates_that_do_not_end_them():
    prompts = Prompts(family("glm-4"))
    (response,) = prompts.encode("[gMASK]<sop><|user|>\nHow?<|assistant|>\n", ["So."])[1]
    assert prompts.tokenizer.decode(response) == "So.<eos>"


def test_the_token_that_ends_a_turn_may_have_any_name():
    template = turns("<%s>", "<|end_of_response|>(end of response)", "<assistant>")
    prompts = Prompts(byte_level("<|end_of_response|>", eos="<eos>", template=template))
    assert prompts.tokenizer.decode(prompts.encode_response("So.")) == "So.<|end_of_response|>"


@pytest.mark.parametrize(
    "said", ["Hm. <think>a</think> So.", "Use <think> and </think> tags.", "<think>a</think>b<think>c</think>d"]
)
def test_thoughts_anywhere_in_a_response(said):
    prompts = Prompts(chatml())
    assert prompts.tokenizer.decode(prompts.encode_response(said)) == f"{said}<|im_end|>"


def test_calls_lose_neither_name_nor_arguments():
    asked = [{"role": "user", "content": "Please heat it."}]
    with pytest.raises(UnusableRow, match="leaves out a call: 'heat'"):
        Prompts(chatml()).encode(asked, [CALL])
    with pytest.raises(UnusableRow, match="leaves out a call"):
        Prompts(chatml()).encode([*asked, CALL, {"role": "tool", "content": "230"}], ["So."])


def test_a_response_in_the_chat_format_is_not_wrapped_again():
    prompts = Prompts(chatml())
    assert prompts.encode_response("<|im_start|>assistant\nSo.<|im_end|>") == prompts.encode_response("So.")


def test_special_tokens_in_texts_are_not_doubled():
    prompts = Prompts(family("llama3"))
    assert prompts.encode_prompt("<bos>How?") == prompts.encode_prompt("How?")
    assert prompts.encode_prompt("How?<|eot_id|>") == prompts.encode_prompt("How?")
    plain = Prompts(metaspace(), template="{}")
    assert plain.encode_prompt("<s>How?</s>") == plain.encode_prompt("How?")
    assert plain.encode_prompt("How?").count(plain.tokenizer.bos_token_id) == 1


def test_no_end_token_follows_a_prompt():
    prompts = Prompts(metaspace(ends=True), template="{}\nAnswer:")
    prompt, (response,) = prompts.encode("How?", ["Mix."])
    bos, eos = prompts.tokenizer.bos_token_id, prompts.tokenizer.eos_token_id
    assert prompt[0] == bos and eos not in prompt and response[-1] == eos and response.count(eos) == 1


@pytest.mark.parametrize("gap", ["", " ", "\n"])
def test_a_tokenizer_that_puts_spaces_before_texts_does_not_put_one_before_a_response(gap):
    tokenizer = metaspace()
    prompt, (response,) = Prompts(tokenizer, template="{}:").encode("bread", [gap + "Mix flour."])
    assert [*prompt, *response[:-1]] == tokenizer(f"bread:{gap}Mix flour.").input_ids


def test_what_meets_within_a_token_is_set_aside():
    tokenizer = byte_level(eos="<eos>")
    first = next(t for t in ("bread", " bread", "ques", "degrees") if len(tokenizer(t).input_ids) < len(t) - 1)
    assert len(tokenizer(first[:-1]).input_ids + tokenizer(first[-1]).input_ids) > len(tokenizer(first).input_ids)
    with pytest.raises(UnusableRow, match="prompt and response meet within a token"):
        Prompts(tokenizer, template="{}").encode(first[:-1], [first[-1]])


def test_transcripts_on_base_models_are_what_they_were():
    tokenizer = byte_level(eos="<eos>")
    prompt, responses = Prompts(tokenizer, template="{}").encode("\n\nHuman: How?\n\nAssistant:", ["So.", " So."])
    assert [tokenizer.decode(prompt + ids) for ids in responses] == ["\n\nHuman: How?\n\nAssistant: So.<eos>"] * 2


def test_what_a_template_or_tokenizer_raises_concerns_its_row_alone():
    prompts = Prompts(chatml())
    prompts.tokenizer.chat_template = "{{ messages[0].content / 2 }}"
    with pytest.raises(UnusableRow, match="the chat template refuses it: unsupported operand"):
        prompts.encode_prompt("How?")
    with pytest.raises(UnusableRow, match="the tokenizer refuses it"):
        Prompts(byte_level(eos="<eos>"), template="{}").encode_prompt("half \ud83d")
    with pytest.raises(UnusableRow, match="the prompt has no token"):
        Prompts(byte_level(eos="<eos>"), template="{}").encode_prompt("")


def test_what_needs_a_chat_template():
    prompts = Prompts(character_tokenizer(), template="{}")
    for context, response, tools, what in (
        ([USER], "1", None, "chat messages need"),
        ("1", CALL, None, "a response with more than text needs"),
        ("1", "1", [{"name": "heat"}], "tools need"),
    ):
        with pytest.raises(UnusableRow, match=f"{what} a tokenizer with a chat template"):
            prompts.encode(context, [response], tools)
    with pytest.raises(UnusableRow, match="does not go with a prompt that is a text"):
        Prompts(chatml()).encode("<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n", [CALL])


def test_tools_that_the_template_leaves_out_are_said():
    tokenizer = byte_level(*CHAT, eos="<|im_end|>", template="{{ tools | tojson if tools else '' }}" + CHATML)
    tools = [{"type": "function", "function": {"name": "heat", "description": "x", "parameters": {}}}]
    assert "heat" in tokenizer.decode(Prompts(tokenizer).encode("How?", ["So."], tools)[0])
    with pytest.raises(UnusableRow, match="leaves out the tools: "):
        Prompts(chatml()).encode("How? Heat it, or heat it not.", ["So."], tools)


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_beside_a_response_that_the_template_leaves_out_are_said(name):
    """Also where the response says the same words."""
    turn = {"role": "assistant", "content": "Summer is warm.", name: "warm"}
    with pytest.raises(UnusableRow, match=f"leaves out the response's {name}: 'warm'"):
        Prompts(chatml()).encode("How?", [turn])
    template = turns("<|im_start|>%s\n{{ m." + name + " }}", "<|im_end|>\n", "<|im_start|>assistant\n")
    tokenizer = byte_level(*CHAT, eos="<|im_end|>", template=template)
    (response,) = Prompts(tokenizer).encode("How?", [turn])[1]
    assert tokenizer.decode(response) == "warmSummer is warm.<|im_end|>"
    other = next(each for each in THOUGHTS if each != name)
    (again,) = Prompts(tokenizer).encode("How?", [{**turn, other: "warm"}])[1]
    assert again == response, "the same thought under two keys"


@pytest.mark.parametrize("nothing", ["", "\n"])
def test_no_thoughts_are_not_left_out(nothing):
    turn = {"role": "assistant", "content": "So.", "reasoning_content": nothing}
    assert Prompts(chatml()).encode("How?", [turn]) == Prompts(chatml()).encode("How?", ["So."])


def test_a_part_of_the_tools_that_the_template_leaves_out():
    tokenizer = byte_level(*CHAT, eos="<|im_end|>", template="{{ tools[0] | tojson if tools else '' }}" + CHATML)
    with pytest.raises(UnusableRow, match="leaves out a tool: 'cool'"):
        Prompts(tokenizer).encode("How?", ["So."], [{"name": "heat"}, {"name": "cool"}])


def test_a_bos_that_ends_answers_too():
    template = "{{ bos_token }}" + turns("<|%s|>\n", "{{ eos_token if m.role == 'assistant' }}\n", "<|assistant|>\n")
    prompts = Prompts(byte_level(eos="<|endoftext|>", bos="<|endoftext|>", template=template))
    asked = prompts.encode("How?", ["So."])
    assert prompts.encode("<|user|>\nHow?\n<|assistant|>\n", ["So."]) == asked
    assert prompts.encode("<|endoftext|>How?", ["So."]) == asked


def test_ends_that_are_not_the_templates():
    prompts = Prompts(opened_by_bos())
    with pytest.raises(UnusableRow, match="ends with a token that ends no turn here"):
        prompts.encode("How?", ["So.<|endoftext|>"])
    said = "Is it <|im_end|> or <|endoftext|>"
    assert said in prompts.tokenizer.decode(prompts.encode_prompt(said))


def test_the_templates_arguments_do_not_decide_what_is_rendered():
    given = {"add_generation_prompt": False, "tokenize": True}
    assert Prompts(chatml(), template_kwargs=given).encode("How?", ["So."]) == Prompts(chatml()).encode("How?", ["So."])


def test_the_papers_instruction_and_rewriting_prompt():
    tokenizer = character_tokenizer()
    decode = lambda ids: "".join(tokenizer.convert_ids_to_tokens(ids))  # noqa: E731
    assert decode(Prompts(tokenizer, template="{}=").encode_prompt("1+1")) == "1+1="
    assert Prompts(tokenizer).template == INSTRUCTION
    prompts = Prompts(tokenizer, rewrite="{}#{}#{}>")
    assert decode(prompts.encode_rewrite("1+1", "2", "{}3")) == "1+1#2#<unk><unk>3>"
    assert decode(prompts.encode_response("2")) == "2<eos>"
    chat = Prompts(chatml(), rewrite="{}#{}#{}>")
    assert chat.tokenizer.decode(chat.encode_rewrite([USER], "2", "3")) == (
        "<|im_start|>user\nHow hot is it?#2#3><|im_end|>\n<|im_start|>assistant\n"
    )
    assert Prompts(chatml(), chat=False, template="{}=").encode_prompt("1") == chatml()("1=").input_ids


def test_conversations_to_read():
    assert as_text("q") == "q" and as_text([USER]) == "How hot is it?"
    assert as_text([SYSTEM, USER]) == "system: Be kind.\n\nuser: How hot is it?"
    assert turn_text("a") == "a" and turn_text(CALL) == '{"name": "heat", "arguments": {"x": 1}}'


def test_mistakes():
    with pytest.raises(UserError, match="data.chat_template is true"):
        Prompts(character_tokenizer(), chat=True)
    with pytest.raises(UserError, match="data.prompt_template: expected 1 times"):
        Prompts(character_tokenizer(), template="no hole")
    with pytest.raises(UserError, match="rewards.template: expected 3 times"):
        Prompts(character_tokenizer(), rewrite="{}")
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Prompts(tokenizer)
    broken = byte_level(eos="<eos>", template=turns("", "", "", content="m.text.x"))
    with pytest.raises(UserError, match="a question and its answer: the chat template refuses it"):
        Prompts(broken)
    closes_some = "{% for m in messages %}{{ m.content }}{{ '' if m.content == 'b' else '<end>' }}{% endfor %}"
    unclosed = byte_level("<end>", eos="<eos>", template=closes_some)
    with pytest.raises(UnusableRow, match="does not end the response: ...'b'"):
        Prompts(unclosed).encode("a", ["b"])
