"""Small tokenizers trained on a few sentences, and chat templates in the structure of widely used ones."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "You are a helpful assistant. Today is a warm day: the bread, the river and the bridge are near.",
    "How do I bake bread? Mix flour, water and salt; wait, then bake it at 230 degrees. Is it hot? Yes, no, maybe.",
    "system user assistant model Human Assistant User question response think tools final analysis Instruction",
    "0 1 2 3 4 5 6 7 8 9 10 100 { } [ ] ( ) < > / | # : ; , . ! ? \" ' _ - \n\n\t",
] * 4


def byte_level(*special: str, eos: str, bos: str | None = None, template: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2's and most newer ones: bytes, a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = list(dict.fromkeys([*special, eos, *[bos] * bool(bos)]))
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    made.chat_template = template
    return made


def metaspace(template: str | None = None, ends: bool = False) -> PreTrainedTokenizerFast:
    """As Llama-2's: a space before the text, bytes for the unknown, <s> before and, with `ends`, </s> behind."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    names = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False))
    held = json.loads(tokenizer.to_str())
    held["added_tokens"] = [token for token in held["added_tokens"] if not token["content"].startswith("<0x")]
    held["pre_tokenizer"]["split"] = False  # only training must not merge across spaces
    tokenizer = Tokenizer.from_str(json.dumps(held))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A" + " </s>" * ends, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def turns(
    before: str, after: str, opening: str, roles: str = "m.role", content: str = "m.content", head: str = ""
) -> str:
    """A template that writes every message between `before` (in which %s is the role) and `after`."""
    before = before.replace("%s", "{{ " + roles + " }}")
    body = f"{{% for m in messages %}}{before}{{{{ {content} }}}}{after}{{% endfor %}}"
    return f"{head}{body}{{% if add_generation_prompt %}}{opening}{{% endif %}}"


CHATML = turns("<|im_start|>%s\n", "<|im_end|>\n", "<|im_start|>assistant\n")
_MODEL = "('model' if m.role == 'assistant' else m.role)"
_SYSTEM = "{% if messages[0].role == 'system' %}"
_STRIPPED = "m.content.split('</think>')[-1].lstrip('\\n')"
_LAST_THINKS = (  # the last assistant turn gets a block of thoughts, those before it lose theirs
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = " + _STRIPPED + " %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{% set thought = m.reasoning_content or thought %}<|im_start|>assistant\n{% if loop.last %}<think>\n"
    "{{ thought.strip('\\n') }}\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n%OPEN{% endif %}"
)
_NO_THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
_REFUSES_SYSTEM = _SYSTEM + "{{ raise_exception('System role not supported') }}{% endif %}"
_INST = (  # Llama-2's and Mistral's brackets
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}%GAP{{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>%MID{{ "
    + _STRIPPED
    + " }}{{ eos_token }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>%OPEN{% endif %}"
)
_OSS = (
    "<|start|>system<|message|>Reasoning: medium<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary"
    "<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|start|>assistant<|channel|>final"
    "<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% else %}<|start|>"
    "{{ 'developer' if m.role == 'system' else m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_LLAMA3 = "<|start_header_id|>%s<|end_header_id|>\n\n"

# Name -> template and tokens. In the structure of the families that they are named after, not their text.
FAMILIES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "qwen2.5": (
        _SYSTEM[:-2].replace("==", "!=")
        + "%}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + CHATML,
        ["<|im_start|>", "<|im_end|>"],
    ),
    "qwen3": (_LAST_THINKS.replace("%OPEN", _NO_THINKING), ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "qwen3.5": (_LAST_THINKS.replace("%OPEN", "<think>\n"), ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "qwq": (
        turns("<|im_start|>%s\n", "<|im_end|>\n", "<|im_start|>assistant\n<think>\n", content=_STRIPPED),
        ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    ),
    "nemotron-3": (
        turns(
            "<|im_start|>%s\n{% if m.role == 'assistant' %}<think></think>{% endif %}",
            "<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n",
            content=_STRIPPED,
        ),
        ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    ),
    "nemotron-4": (turns("<extra_id_1>%s\n", "\n", "<extra_id_1>Assistant\n", "m.role | capitalize"), ["<extra_id_1>"]),
    "smollm3": (
        "<|im_start|>system\nToday: {{ strftime_now('%d %B %Y') }}<|im_end|>\n"
        + turns(
            "<|im_start|>%s\n{% if m.role == 'assistant' %}<think>\n\n</think>\n{% endif %}",
            "<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n\n</think>\n",
            content="m.content.lstrip('\\n')",
        ),
        ["<|im_start|>", "<|im_end|>"],
    ),
    "llama2": (_INST.replace("%GAP", " "), []),
    "mistral-v3": (_REFUSES_SYSTEM + _ALTERNATE + _INST.replace("%GAP", " "), ["[INST]", "[/INST]"]),
    "mistral-tekken": (
        _INST.replace("%GAP", "").replace("[INST] ", "[INST]").replace(" [/INST]", "[/INST]"),
        ["[INST]", "[/INST]"],
    ),
    "llama3": (
        turns(
            _LLAMA3,
            "<|eot_id|>",
            _LLAMA3.replace("%s", "assistant"),
            content="m.content | trim",
            head="{{ bos_token }}",
        ),
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "llama3.1": (
        "{{ bos_token }}"
        + _LLAMA3.replace("%s", "system")
        + "Today Date: {{ strftime_now('%d %b %Y') }}\n\n"
        + _SYSTEM
        + "{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
        + turns(
            _LLAMA3,
            "{{ '<|eom_id|>' if m.tool_calls else '<|eot_id|>' }}",
            _LLAMA3.replace("%s", "assistant"),
            content="(m.content or (m.tool_calls[0].function | tojson)) | trim",
        ),
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
    ),
    "llama4": (
        turns(
            "<|header_start|>%s<|header_end|>\n\n",
            "<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n",
            content="m.content | trim",
            head="{{ bos_token }}",
        ),
        ["<|header_start|>", "<|header_end|>", "<|eot|>"],
    ),
    "gemma": (
        _REFUSES_SYSTEM
        + _ALTERNATE
        + turns(
            "<start_of_turn>%s\n",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
            _MODEL,
            "m.content | trim",
            "{{ bos_token }}",
        ),
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "gemma3": (
        "{{ bos_token }}{% set first = '' %}"
        + _SYSTEM
        + "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        + turns(
            "<start_of_turn>%s\n{{ first if loop.first else '' }}",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
            _MODEL,
            "m.content | trim",
        ),
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "phi3": (turns("<|%s|>\n", "<|end|>\n", "<|assistant|>\n"), ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    "phi4": (
        turns("<|im_start|>%s<|im_sep|>", "<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
        ["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
    ),
    "zephyr": (turns("<|%s|>\n", "{{ eos_token }}\n", "<|assistant|>\n"), []),
    "tulu": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}",
        [],
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}"
        "ASSISTANT: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        [],
    ),
    "alpaca": (
        "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n{% elif m.role == 'user' %}"
        "### Instruction:\n{{ m.content }}\n\n{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        [],
    ),
    "deepseek-llm": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
        "{% else %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        [],
    ),
    "deepseek-v3": (_DEEPSEEK.replace("%MID", "").replace("%OPEN", ""), ["<|User|>", "<|Assistant|>"]),
    "deepseek-r1-distill": (
        _DEEPSEEK.replace("%MID", "").replace("%OPEN", "<think>\n"),
        ["<|User|>", "<|Assistant|>", "<think>", "</think>"],
    ),
    "deepseek-v3.1": (
        _DEEPSEEK.replace("%MID", "</think>").replace("%OPEN", "</think>"),
        ["<|User|>", "<|Assistant|>", "<think>", "</think>"],
    ),
    "glm-4": (
        turns("<|%s|>\n", "", "<|assistant|>\n", head="[gMASK]<sop>"),
        ["<|user|>", "<|assistant|>", "[gMASK]", "<sop>"],
    ),
    "glm-4.5": (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think></think>\n"
        "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}\n"
        "<think></think>{% endif %}{% endif %}",
        ["<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>", "<think>", "</think>"],
    ),
    "gpt-oss": (_OSS, ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>", "<|call|>"]),
    "command-r": (
        turns(
            "<|START_OF_TURN_TOKEN|>%s",
            "<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            "{'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}[m.role]",
            "m.content | trim",
            "{{ bos_token }}",
        ),
        ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"],
    ),
    "granite": (
        turns("<|start_of_role|>%s<|end_of_role|>", "{{ eos_token }}\n", "<|start_of_role|>assistant<|end_of_role|>"),
        ["<|start_of_role|>", "<|end_of_role|>"],
    ),
    "exaone": (
        turns("[|%s|]", "{{ '\n' if m.role == 'user' else '[|endofturn|]\n' }}", "[|assistant|]"),
        ["[|user|]", "[|assistant|]", "[|system|]", "[|endofturn|]"],
    ),
    "openchat": (
        turns(
            "GPT4 Correct %s: ",
            "<|end_of_turn|>",
            "GPT4 Correct Assistant:",
            "m.role | capitalize",
            head="{{ bos_token }}",
        ),
        ["<|end_of_turn|>"],
    ),
    "kimi": (
        turns("<|im_%s|>{{ m.role }}<|im_middle|>", "<|im_end|>", "<|im_assistant|>assistant<|im_middle|>"),
        ["<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>"],
    ),
    "seed-oss": (turns("<seed:bos>%s\n", "<seed:eos>", "<seed:bos>assistant\n"), ["<seed:bos>", "<seed:eos>"]),
    "minimax": (
        turns(
            "<beginning_of_sentence>%s name=x\n",
            "<end_of_sentence>\n",
            "<beginning_of_sentence>ai name=x\n",
            "('ai' if m.role == 'assistant' else m.role)",
        ),
        ["<beginning_of_sentence>", "<end_of_sentence>"],
    ),
    "baichuan": (
        turns("%s", "", "<reserved_107>", "('<reserved_107>' if m.role == 'assistant' else '<reserved_106>')"),
        ["<reserved_106>", "<reserved_107>"],
    ),
    "ignores-the-system": (
        turns(
            "<|im_start|>%s\n",
            "<|im_end|>\n",
            "<|im_start|>assistant\n",
            content="(m.content if m.role != 'system' else '')",
        ),
        ["<|im_start|>", "<|im_end|>"],
    ),
}


def family(name: str) -> PreTrainedTokenizerFast:
    template, special = FAMILIES[name]
    return byte_level("<pad>", *special, eos="<eos>", bos="<bos>", template=template)
