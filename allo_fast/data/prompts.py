"""From texts to token ids: chat template where the tokenizer has one, else the paper's instruction."""

from transformers import PreTrainedTokenizerBase

from allo_fast.config import UserError

INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response: Let's think step by step."
)
REWRITE = (
    "Given the problem and the correct solution, you need to correct the mistakes in the prediction to get the correct "
    "answer. You should write down the correct prediction and use 'The answer is: ' (without quotation mark) to "
    "identify the final answer. You should make minimal modifications. You should not copy the problem.\n\n"
    "### Problem:\n{}\n\n### Correct solution:\n{}\n\n### Prediction:\n{}\n\n### Correct prediction:\n"
)


class Prompts:
    """Encodes prompts and responses; the same prompt is used to sample, to train and to evaluate.

    chat: True needs a chat template, False never uses it, None uses it where there is one. template: "{}" is the
    question. Raises UserError for a tokenizer without end-of-sequence token or without the chat template it needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool | None = None,
        template: str | None = None,
        rewrite: str | None = None,
    ):
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token")
        if chat and not tokenizer.chat_template:
            raise UserError(f"{tokenizer.name_or_path}: data.chat_template is true, but the tokenizer has none")
        for name, text, holes in (("data.prompt_template", template, 1), ("rewards.template", rewrite, 3)):
            if text is not None and text.count("{}") != holes:
                raise UserError(f"{name}: expected {holes} times {{}}, got {text!r}")
        self.tokenizer = tokenizer
        self.chat = bool(tokenizer.chat_template) and chat is not False
        self.template = template or ("{}" if self.chat else INSTRUCTION)
        self.rewrite = rewrite or REWRITE
        self.end_token = self._turn_end() if self.chat else tokenizer.eos_token_id
        self.end_tokens = {self.end_token, tokenizer.eos_token_id}

    def encode_prompt(self, prompt: str | list[dict]) -> list[int]:
        """Token ids of a question or of chat messages, ready for a response to follow."""
        if isinstance(prompt, str):
            return self._encode(self.template.replace("{}", prompt, 1))
        if not self.chat:
            raise UserError(f"{self.tokenizer.name_or_path}: chat messages need a tokenizer with a chat template")
        return self._apply_template(prompt)

    def encode_rewrite(self, problem: str | list[dict], solution: str, response: str) -> list[int]:
        """Token ids of the rewriting prompt (T4 of the paper's token rewards)."""
        question = problem if isinstance(problem, str) else problem[-1]["content"]
        parts = iter((question, solution, response))
        text = "".join(piece + next(parts, "") for piece in self.rewrite.split("{}"))
        return self._encode(text)

    def encode_response(self, response: str) -> list[int]:
        """Token ids of a response and what ends it: the chat template's end of turn, else the end of sequence."""
        return [*self.tokenizer(response, add_special_tokens=False).input_ids, self.end_token]

    def _encode(self, text: str) -> list[int]:
        return (
            self._apply_template([{"role": "user", "content": text}]) if self.chat else self.tokenizer(text).input_ids
        )

    def _apply_template(self, messages: list[dict]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _turn_end(self) -> int:
        """The special token that closes an assistant's turn; it is not the tokenizer's eos in Gemma's, for one."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "response"}]
        after = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("response")[2]
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        closing = self.tokenizer(after, add_special_tokens=False).input_ids
        return next((token for token in closing if token in special), self.tokenizer.eos_token_id)
