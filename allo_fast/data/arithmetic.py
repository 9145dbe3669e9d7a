"""Generated arithmetic with worked steps, and the character tokenizer that reads it: a base model from nothing."""

import random
import zlib

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = "0123456789+-=., ?#>Theanswri\n"


def arithmetic_row(split: str, index: int) -> dict[str, str]:
    """Problem `index` of the endless split "train" or "test"; no problem is in both."""
    draw = random.Random(index)
    while True:
        numbers = [draw.randint(2, 19) for _ in range(4)]
        signs = [draw.choice("+-") for _ in range(3)]
        problem = str(numbers[0]) + "".join(sign + str(number) for sign, number in zip(signs, numbers[1:], strict=True))
        total, steps = numbers[0], []
        for sign, number in zip(signs, numbers[1:], strict=True):
            result = total + number if sign == "+" else total - number
            steps.append(f"{total}{sign}{number}={result}")
            total = result
        held_out = zlib.crc32(problem.encode()) % 10 == 0
        if held_out == (split == "test") and min(int(step.split("=")[1]) for step in steps) >= 0:
            solution = ", ".join(steps) + f". The answer is {total}"
            return {"problem": problem, "solution": solution, "answer": str(total)}


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of ALPHABET, with <pad> and <eos>."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(ALPHABET)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
