"""Perplexity of held-out text, `data.text`: how much a model lost of what it could before.

    exp(-mean log p(token | those before it in its window))

Windows have data.max_prompt_tokens tokens, or as many as the model reads.
"""

import math
from collections.abc import Generator, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from allo_fast.config import Config, UserError
from allo_fast.data.sources import UnusableRow, lacks, read_rows
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import by_chunks
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.models import inference
from allo_fast.stages.problems import limits
from allo_fast.stages.scores import response_logps

TEXTS = "texts.jsonl"  # {id, logp, tokens} of each window


def perplexity(
    unit: Unit, path: str | Path, delta: Path | None, reader: str | Path
) -> Generator[Progress, None, dict[str, float]]:
    """Of the model at `path`, with a delta of it if any, and of how many tokens; reader: whose tokenizer reads them."""
    config = unit.config
    windows = [*text_windows(config, load_tokenizer(reader), path)]
    with inference(unit, path, delta, scoring=True) as frozen:

        def work(chunk: list[dict], start: int) -> list[dict]:
            sums = response_logps(frozen, chunk)
            return [
                {"id": row["id"], "logp": logp, "tokens": len(row["responses"][0]["ids"])}
                for row, (logp,) in zip(chunk, sums, strict=True)
            ]

        rows = yield from by_chunks(
            unit, TEXTS, windows, config.evaluate.batch_size, "window of text", work, frozen.sharded
        )
    tokens = sum(row["tokens"] for row in rows)
    return {"perplexity": math.exp(-math.fsum(row["logp"] for row in rows) / tokens), "text_tokens": tokens}


def text_windows(config: Config, tokenizer: PreTrainedTokenizerBase, *paths: str | Path) -> Iterator[dict]:
    """Rows {text} as problems: a window's first token is the prompt; each token but a text's first is in one response.

    paths: the models that read them; none: the base. Raises UserError for a row without a text, and where no text has
    two tokens.
    """
    source, found = config.data.text, False
    width = max(2, min(config.data.max_prompt_tokens, limits(config, 0, *paths).positions))
    for name, row in read_rows(source):
        try:
            if "text" not in (fields := row()):
                raise lacks(fields, "text")
            if not isinstance(text := fields["text"], str):
                raise UnusableRow(f"text: expected a text, got {text!r:.80}")
        except UnusableRow as error:
            raise UserError(f"data.text: {name}: {error}") from None
        ids = tokenizer(text).input_ids
        for start in range(0, len(ids) - 1, width - 1):
            first, *rest = ids[start : start + width]
            found = True
            yield {"id": f"{name}:{start}", "prompt_ids": [first], "responses": [{"ids": rest}]}
    if not found:
        raise UserError(f"data.text: {source}: no text of two tokens")
