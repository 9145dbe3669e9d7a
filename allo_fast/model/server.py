"""Responses from a server of OpenAI's API: vLLM's, `transformers serve`, or any other.

    POST URL/chat/completions {messages, n, seed, ...}      of a conversation
    POST URL/completions      {prompt, n, seed, ...}        of a text

What a moment may cure (no connection, no answer in time, status 408, 429 or 5xx, an answer that is no JSON or lacks its
choices) is tried again, later and later; a request that the server refuses is one without `n` next. What is left ends
the stage, or, of a single problem, is why it has no response.
"""

import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np

from allo_fast.config import SampleConfig, UserError, first_line
from allo_fast.data.encoding import CUT

logger = logging.getLogger(__name__)

FIRST_WAIT = 1.0  # seconds before a request is tried again; twice as long each time
LONGEST_WAIT = 60.0
_MANY = 8  # problems: so many without a text lie with the server
_REFUSALS = {400, 413, 422}  # of this very request
_KEY, _PLACE = {401, 403}, {404, 405}


class _Refused(Exception):
    """The server takes such a request never."""


class _Failed(Exception):
    """It did not answer, which may change. wait: seconds that it asks for."""

    def __init__(self, said: str, wait: float = 0.0):
        super().__init__(said)
        self.wait = wait


@dataclass
class Answer:
    """To one problem. reasons: why others of its texts are missing."""

    texts: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class Server:
    """settings: of the run. model: the name under which it has the base."""

    def __init__(self, settings: SampleConfig, model: str):
        self.settings, self.server = settings, settings.server
        self.url, self.key = self.server.url.rstrip("/"), api_key(settings)
        self.body = {"model": self.server.model or model, "temperature": settings.temperature}
        self.body |= {"top_p": settings.top_p, "max_tokens": settings.max_new_tokens}
        self.said_singly = self.said_tokens = False

    def respond(self, requests: Sequence[dict], lengths: Sequence[int] | None, seed: int, first: int) -> list[Answer]:
        """To each request {messages or prompt, ...}. lengths: tokens of their prompts here, if known. first: the number
        of the first problem, which with `seed` and the response's own makes the seed of a request.

        Raises UserError where the server is not there, or has no text for the very first ones, or for that many at once
        that they are not the reason.
        """

        def work(number: int) -> Answer:
            length = lengths[number] if lengths else None
            return self._answer(requests[number], length, lambda sample: _seed(seed, first + number, sample))

        answers = _parallel(work, len(requests), self.server.concurrency)
        if (first == 0 or len(answers) >= _MANY) and not any(answer.texts for answer in answers):
            raise UserError(self._problem(answers[0].reasons[0], "look into its log"))
        return answers

    def _answer(self, request: dict, length: int | None, seed_of: Callable[[int], int]) -> Answer:
        """Every problem is first asked with `n`: what others were answered decides no seed."""
        answer, count = Answer(), self.settings.num_return_sequences
        missing, why = count, ""
        while (number := len(answer.texts) + len(answer.reasons)) < count:
            try:
                texts = self._choices(request, length, seed_of(number), missing)
            except _Refused as refusal:
                if missing == 1:
                    answer.reasons += [f"the server refuses the request: {refusal}"] * (count - number)
                    break
                why, missing = f"refuses {missing} responses to a request: {refusal}", 1
                continue
            if len(texts) < missing:
                why = f"gives {len(texts)} of {missing} responses"
            if why:
                self._say_singly(why)
            missing = 1
            answer.texts += [text for text in texts if not _flaw(text)]
            answer.reasons += [f"the server gave {flaw}" for flaw in map(_flaw, texts) if flaw]
        return answer

    def _say_singly(self, why: str) -> None:
        if not self.said_singly:
            self.said_singly = True
            logger.warning("%s: %s; one request for each response", self.url, why)

    def _choices(self, request: dict, length: int | None, seed: int, count: int) -> list[str]:
        """Up to `count` texts, at least one. Raises _Refused, UserError."""
        chat = "messages" in request
        path = "chat/completions" if chat else "completions"
        body = {**self.body, **request, "seed": seed} | ({"n": count} if count > 1 else {})

        def read(reply: dict) -> list[str]:
            texts = [(choice["message"]["content"] if chat else choice["text"]) or "" for choice in reply["choices"]]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError("no choices")
            self._compare_tokens(reply.get("usage"), length)
            return [text.rstrip(CUT) for text in texts[:count]]

        return self._post(path, json.dumps(body).encode(), read)

    def _compare_tokens(self, usage: object, length: int | None) -> None:
        read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if None not in (read, length) and read != length and not self.said_tokens:
            self.said_tokens = True
            message = "%s: it reads %s tokens of a prompt that has %s here: another chat template or tokenizer?"
            logger.warning(message, self.url, read, length)

    def _post(self, path: str, body: bytes, read: Callable[[dict], list[str]]) -> list[str]:
        wait = FIRST_WAIT
        for left in reversed(range(self.server.retries + 1)):
            try:
                return self._try(path, body, read)
            except _Failed as failure:
                if not left:
                    tries = f"{failure}; {self.server.retries + 1} tries"
                    raise UserError(self._problem(tries, "start it, or correct sample.server")) from None
                time.sleep(min(max(wait, failure.wait), LONGEST_WAIT))
                wait *= 2
        raise AssertionError("the last try returns or raises")

    def _try(self, path: str, body: bytes, read: Callable[[dict], list[str]]) -> list[str]:
        """Raises _Failed, _Refused, UserError."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            asked = urllib.request.Request(f"{self.url}/{path}", body, headers)
            until = time.monotonic() + self.server.timeout
            with urllib.request.urlopen(asked, timeout=self.server.timeout) as reply:
                content = _read(reply, until)
        except urllib.error.HTTPError as error:
            with error:
                raise self._of_status(error) from None
        except TimeoutError:
            raise _Failed(f"no answer in {self.server.timeout:g} s") from None
        except http.client.InvalidURL as error:
            raise UserError(self._problem(first_line(error), "correct it")) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(first_line(error)) from None
        except ValueError as error:  # of an address, too
            raise UserError(self._problem(first_line(error), "correct it")) from None
        try:
            return read(json.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _Failed(f"its answer is not that of OpenAI's API: {content[:100]!r}") from None

    def _of_status(self, error: urllib.error.HTTPError) -> Exception:
        try:
            text = error.read(2000).decode("utf-8", "replace")
            said = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())[:200]
        except (OSError, http.client.HTTPException):
            said = ""
        status = f"status {error.code}" + f": {said}" * bool(said)
        if error.code in _REFUSALS:
            return _Refused(status)
        if error.code in _KEY:
            return UserError(self._problem(status, "sample.server.api_key_env names the variable that holds its key"))
        if error.code in _PLACE:
            remedy = f"does the url end with /v1, and is {self.body['model']!r} what it calls the model (/v1/models)?"
            return UserError(self._problem(status, remedy))
        after = error.headers.get("Retry-After", "")
        return _Failed(status, float(after) if after.isascii() and after.isdigit() else 0.0)

    def _problem(self, what: str, remedy: str) -> str:
        return f"sample.server.url: {self.url}: {what}; {remedy}. The same command goes on with what is missing"


def _flaw(text: str) -> str | None:
    """Why no tokenizer takes it."""
    if not text.strip():
        return "an empty text"
    return None if text.encode(errors="ignore").decode() == text else "half a character"


def _read(reply: http.client.HTTPResponse, until: float) -> bytes:
    """All of it. Raises TimeoutError where it comes too slowly, and IncompleteRead where not all of it comes."""
    parts = []
    while part := reply.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > until:
            raise TimeoutError
    if reply.length:
        raise http.client.IncompleteRead(b"".join(parts), reply.length)
    return b"".join(parts)


def api_key(settings: SampleConfig) -> str | None:
    """Raises UserError, which does not show it, where a variable is named that is not set or cannot be a key."""
    if not (name := settings.server.api_key_env):
        return None
    if not (key := os.environ.get(name, "").strip()):
        raise UserError(f"sample.server.api_key_env: {name}: not set in the environment")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"sample.server.api_key_env: {name}: no key: it has other signs than printable ASCII")
    return key


def _seed(seed: int, number: int, sample: int) -> int:
    """31 bits, which every server takes."""
    return int(np.random.SeedSequence([seed, number, sample]).generate_state(1)[0] >> 1)


def _parallel(work: Callable[[int], Answer], count: int, threads: int) -> list[Answer]:
    """work(0), work(1), ... in this order, so many at once. The first error ends all, and waits for no other request:
    the threads are no reason for a process to stay."""
    waiting, done, ended = SimpleQueue(), SimpleQueue(), threading.Event()
    for number in range(count):
        waiting.put(number)

    def run() -> None:
        while not ended.is_set():
            try:
                number = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((number, work(number), None))
            except BaseException as error:  # raised where the results are collected
                ended.set()
                done.put((number, None, error))

    for _ in range(min(threads, count)):
        threading.Thread(target=run, daemon=True).start()
    results: dict[int, Answer] = {}
    try:
        while len(results) < count:
            number, results[number], error = done.get()
            if error:
                raise error
    finally:
        ended.set()
    return [results[number] for number in range(count)]
