"""What a stage trains on: prompts, their responses, and which of them make an example."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from allo_fast.data.arrays import Lazy, Numbers, Ragged, Tuples


@dataclass(frozen=True)
class Response:
    prompt: int  # index into Corpus.prompts
    tokens: list[int]


class Responses(Lazy[Response]):
    def __init__(self, folder: Path | None = None):
        self.tokens, self._prompts, self.folder = Ragged("i", folder), Numbers("i", folder), folder

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, response: Response) -> None:
        self.tokens.append(response.tokens)
        self._prompts.extend((response.prompt,))

    def item(self, index: int) -> Response:
        return Response(int(self.prompts[index]), self.tokens.item(index))

    @property
    def prompts(self) -> np.ndarray:
        """Of each response, int32."""
        return self._prompts.values


@dataclass
class Corpus:
    """What a stage trains on. An example is a tuple of response indices: (chosen, rejected) or (response,).

    names: of the row that each prompt came from. weights: of each response's tokens in losses on pairs; loss_weights:
    of the pairs of each prompt; None where all weigh 1.
    """

    prompts: Ragged = field(default_factory=lambda: Ragged("i"))
    responses: Responses = field(default_factory=Responses)
    examples: Tuples | list[tuple[int, ...]] = field(default_factory=Tuples)
    names: Ragged = field(default_factory=lambda: Ragged("B"))
    weights: Ragged | None = None
    loss_weights: Numbers | None = None

    @classmethod
    def on_disk(cls, folder: Path) -> "Corpus":
        """One whose numbers lie in nameless files of `folder`, mapped into memory once they are read."""
        return cls(Ragged("i", folder), Responses(folder), Tuples(folder), Ragged("B", folder))

    def add(
        self,
        prompt: list[int],
        responses: Iterable[list[int]],
        name: str = "",
        *,
        weights: Mapping[tuple[int, ...], list[float]] = {},
        loss_weight: float = 1.0,
    ) -> list[int]:
        """Adds one problem; returns the indices of its responses. weights: of the tokens of those that have any."""
        assert prompt, "the first token of a response needs one before it"
        number, first, added = len(self.prompts), len(self.responses), [*responses]
        if weights and self.weights is None:
            self.weights = Ragged("f", self.responses.folder)
            for length in self.responses.tokens.lengths.tolist():
                self.weights.append([1.0] * length)
        if loss_weight != 1 and self.loss_weights is None:
            self.loss_weights = Numbers("f", self.responses.folder)
            self.loss_weights.extend([1.0] * number)
        self.prompts.append(prompt)
        self.names.append(name.encode())
        for tokens in added:
            self.responses.append(Response(number, tokens))
            if self.weights is not None:
                self.weights.append(weights.get(tuple(tokens), [1.0] * len(tokens)))
        if self.loss_weights is not None:
            self.loss_weights.extend([loss_weight])
        return list(range(first, len(self.responses)))

    def only(self, numbers: Sequence[int]) -> "Corpus":
        """With these of its examples, by their numbers."""
        examples = Tuples()
        examples += map(tuple, np.asarray(self.examples)[numbers])
        return replace(self, examples=examples)

    def names_of(self, examples: Iterable[tuple[int, ...]]) -> list[str]:
        """Of the rows that the examples came from, each once."""
        prompts = dict.fromkeys(self.responses[example[0]].prompt for example in examples)
        return [bytes(self.names[prompt]).decode() for prompt in prompts]

    @property
    def longest(self) -> int:
        """Tokens of a prompt with its response, at most."""
        return int((self.prompts.lengths[self.responses.prompts] + self.responses.tokens.lengths).max())

    def arrays(self) -> Iterator[np.ndarray]:
        """All that it holds, but for names."""
        yield from self.prompts.arrays()
        yield from self.responses.tokens.arrays()
        yield from (self.responses.prompts, np.asarray(self.examples))
        yield from self.weights.arrays() if self.weights else ()
        yield from [self.loss_weights.values] if self.loss_weights else ()
