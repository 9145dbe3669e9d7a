"""Responses from a server of OpenAI's API: what it answers, and what it does instead."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import tiny_llama
from tiny import CHATML, byte_level
from transformers.utils.import_utils import is_serve_available

from allo_fast.__main__ import main
from allo_fast.config import SampleConfig, UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.prompts import Prompts
from allo_fast.model import server as module
from allo_fast.model.saving import save_model
from allo_fast.model.server import Server

CHAT = [{"messages": [{"role": "user", "content": f"question {number}"}]} for number in range(4)]


class Handler(BaseHTTPRequestHandler):
    """Answers as its server's `reply(path, body)` says: a status and what is written, bytes or to be JSON."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body, dict(self.headers)))
        status, said = self.server.reply(self.path, body)
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for first in range(0, len(content), self.server.piece):
            self.wfile.write(content[first : first + self.server.piece])
            threading.Event().wait(self.server.pause)

    def log_message(self, *_):
        pass


@contextmanager
def serving(reply, headers=(), piece=1 << 30, pause=0.0):
    """A server on loopback, and what it was asked. Answers come in pieces of so many bytes, with pauses in seconds."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.reply, server.headers, server.asked, server.lock = reply, dict(headers), [], threading.Lock()
        server.piece, server.pause = piece, pause
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", server.asked
        finally:
            server.shutdown()


def chosen(texts, chat=True, tokens=None):
    choices = [{"message": {"content": text}} if chat else {"text": text} for text in texts]
    return {"choices": choices} | ({"usage": {"prompt_tokens": tokens}} if tokens else {})


def echo(path, body):
    """Of each response its question, its place and the request's seed."""
    said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return 200, chosen([f"{said}: {n} {body['seed']}" for n in range(body.get("n", 1))], "messages" in body, 7)


def asking(url, samples=3, **settings):
    given = {"url": url, "retries": 2, "timeout": 5, **settings}
    return Server(
        SampleConfig(num_return_sequences=samples, engine="server", server=given, max_new_tokens=9), "org/base"
    )


def respond(server, requests=CHAT, first=0, seed=0):
    return server.respond(requests, [7] * len(requests), seed, first)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)


def test_what_is_asked_and_answered():
    with serving(echo) as (url, asked):
        answers = respond(asking(url + "/"))
        assert [answer.texts[1].partition(" 1 ")[0] for answer in answers] == [
            f"question {n}: 1"[:-2] for n in range(4)
        ]
        assert all(len(answer.texts) == 3 and not answer.reasons for answer in answers)
        path, body, headers = asked[0]
        assert path == "/v1/chat/completions" and "Authorization" not in headers
        expected = {"model": "org/base", "temperature": 0.7, "top_p": 0.95, "max_tokens": 9, "n": 3}
        assert {name: body[name] for name in expected} == expected and body.keys() == {*expected, "messages", "seed"}
        respond(asking(url, model="other", samples=1), [{"prompt": "2+2="}])
        path, body, _ = asked[-1]
        assert path == "/v1/completions" and body["prompt"] == "2+2=" and body["model"] == "other" and "n" not in body


def test_seeds_follow_from_run_problem_and_sample():
    def refuses_n(path, body):
        return echo(path, body) if "n" not in body else (422, {"detail": "n is not supported"})

    def texts(reply, first=0, seed=0, requests=CHAT):
        with serving(reply) as (url, _):
            return [answer.texts for answer in respond(asking(url), requests, first, seed)]

    whole = texts(refuses_n)
    assert texts(refuses_n, first=2, requests=CHAT[2:]) == whole[2:], "a killed run asks for the rest as the whole did"
    seeds = {text.split()[-1] for same in whole for text in same}
    assert (
        len(seeds) == 12
        and all(int(seed) < 1 << 31 for seed in seeds)
        and not seeds & {text.split()[-1] for same in texts(refuses_n, seed=1) for text in same}
    )
    assert {text.split()[-1] for same in texts(echo) for text in same} < seeds, "with n, the first response's"


def test_a_refused_problem_changes_no_other_ones_seeds():
    def reply(path, body):
        return (400, {"error": "too long"}) if "question 1" in str(body["messages"]) else echo(path, body)

    with serving(reply) as (url, _):
        whole = respond(asking(url, concurrency=1))
        assert [answer.texts for answer in whole[2:]] == [
            answer.texts for answer in respond(asking(url), CHAT[2:], first=2)
        ]
        assert len({text.split()[-1] for text in whole[3].texts}) == 1, "one request has them all"


@pytest.mark.parametrize("status, gives", [(422, 0), (400, 0), (200, 1), (200, 2)])
def test_a_server_without_n_is_asked_for_each_response(status, gives, caplog):
    def reply(path, body):
        if body.get("n", 1) == 1:
            return echo(path, body)
        return status, chosen(["first", "second"][:gives]) if gives else {"error": "n?"}

    with serving(reply) as (url, asked):
        server = asking(url, concurrency=1)
        assert [len(answer.texts) for answer in respond(server)] == [3] * 4
        assert [body.get("n", 1) for _, body, _ in asked] == ([3] + [1] * (3 - gives)) * 4, "each is asked as any other"
    (said,) = [record.message for record in caplog.records]
    assert "one request for each response" in said and url in said


@pytest.mark.parametrize(
    "status, said",
    [
        (500, b"oops"),
        (503, b""),
        (429, b"slow down"),
        (200, b"<html>"),
        (200, b'{"choices": []}'),
        (200, b'{"choices": [{"message": {}}]}'),
        (200, b'{"choices": [{"message": {"content": 3}}]}'),
        (200, b"[" * 100_000),
    ],
)
def test_what_passes_is_tried_again_and_what_stays_ends_it(status, said):
    failures = []

    def once(path, body):
        failures.append(body)
        return (status, said) if len(failures) < 3 else echo(path, body)

    with serving(once, {"Retry-After": "0"}) as (url, _):
        assert [len(answer.texts) for answer in respond(asking(url), CHAT[:1])] == [3]
    assert failures[0] == failures[1] == failures[2]
    with serving(lambda *_: (status, said)) as (url, asked):
        with pytest.raises(UserError) as error:
            respond(asking(url), CHAT[:1])
        assert len(asked) == 3
    message = str(error.value)
    assert (
        message.startswith(f"sample.server.url: {url}: ") and "; 3 tries; start it, or correct sample.server" in message
    )
    assert "\n" not in message and len(message) < 500
    assert (f"status {status}" in message) == (status != 200) and (
        status != 200 or "not that of OpenAI's API" in message
    )


def test_a_server_that_is_down_or_slow():
    with serving(echo) as (url, _):
        pass
    with pytest.raises(UserError, match=f"{url}: .*refused.*; 3 tries"):
        respond(asking(url))
    ended = threading.Event()

    def slow(path, body):
        ended.wait(5)
        return echo(path, body)

    with serving(slow) as (url, _):
        begun = time.monotonic()
        with pytest.raises(UserError, match=f"{url}: no answer in 0.05 s; 1 tries"):
            respond(asking(url, timeout=0.05, retries=0))
        assert time.monotonic() - begun < 2, "nobody waits for the other requests"
        ended.set()


def test_an_answer_that_comes_in_drops_is_too_late():
    with serving(echo, piece=1, pause=0.03) as (url, _):
        begun = time.monotonic()
        with pytest.raises(UserError, match=f"{url}: no answer in 0.2 s; 1 tries"):
            respond(asking(url, timeout=0.2, retries=0), CHAT[:1])
        assert time.monotonic() - begun < 2


def test_a_terminal_gets_no_codes_from_a_server():
    with serving(lambda *_: (401, b"\x1b[31mred\x07")) as (url, _), pytest.raises(UserError) as raised:
        respond(asking(url), CHAT[:1])
    assert str(raised.value).isprintable() and "red" in str(raised.value)


def test_a_server_says_how_long_to_wait(monkeypatch):
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    for header, expected in (("7", [7.0, 7.0]), ("9999", [60.0, 60.0]), ("tomorrow", [0.01, 0.02])):
        with serving(lambda *_: (429, b""), {"Retry-After": header}) as (url, _), pytest.raises(UserError):
            respond(asking(url), CHAT[:1])
        assert waited == expected
        waited.clear()


def test_nothing_stays_open_while_it_waits(monkeypatch):
    failed, of_status = [], Server._of_status
    monkeypatch.setattr(Server, "_of_status", lambda self, error: failed.append(error) or of_status(self, error))
    monkeypatch.setattr(module.time, "sleep", lambda _: closed.append(failed[-1].closed))
    closed = []
    with serving(lambda *_: (503, b"x" * 9000)) as (url, _), pytest.raises(UserError):
        respond(asking(url), CHAT[:1])
    assert closed == [True, True]


@pytest.mark.parametrize(
    "status, remedy",
    [(401, "api_key_env names"), (403, "api_key_env names"), (404, "end with /v1, and is 'org/base' what it calls")],
)
def test_what_does_not_pass_is_not_tried_again(status, remedy):
    with serving(lambda *_: (status, {"error": "because"})) as (url, asked):
        with pytest.raises(UserError, match=f"{url}: status {status}: .*because.*{remedy}"):
            respond(asking(url, concurrency=1))
        assert len(asked) == 1


def test_a_problem_that_is_refused_or_left_empty_is_set_aside():
    def reply(path, body):
        content = body["messages"][-1]["content"]
        if content == "question 1":
            return 400, {"error": "too long"}
        return 200, chosen(["", "\ud83d", "text\ufffd"] if content == "question 2" else [None, "a", "b"])

    with serving(reply) as (url, _):
        answers = respond(asking(url, concurrency=1), CHAT[:1] + CHAT[2:])
        assert [answer.texts for answer in answers] == [["a", "b"], ["text"], ["a", "b"]]
        assert answers[1].reasons == ["the server gave an empty text", "the server gave half a character"]
        answers = respond(asking(url, concurrency=1))
        assert answers[1].texts == [] and len(answers[1].reasons) == 3
        assert answers[1].reasons[0].startswith("the server refuses the request: status 400") and "too long" in str(
            answers
        )
        with pytest.raises(UserError, match=f"{url}: the server refuses the request: status 400: .*too long"):
            respond(asking(url), CHAT[1:2])
        (alone,) = respond(asking(url), CHAT[1:2], first=32)
        assert alone.reasons == answers[1].reasons, "where others have texts it is counted, whichever chunk it is in"
        with pytest.raises(UserError, match="too long"):
            respond(asking(url), CHAT[1:2] * 8, first=32)
    with serving(lambda *_: (200, chosen([""] * 3))) as (url, _), pytest.raises(UserError, match="gave an empty text"):
        respond(asking(url))


@pytest.mark.parametrize("url", ["http://a..b/v1", "http://[::1/v1", "http://localhost:1x/v1"])
def test_an_address_that_is_none_ends_it_at_once_and_shows_no_key(url, monkeypatch):
    monkeypatch.setenv("ALLO_TEST_KEY", "secret")
    with pytest.raises(UserError) as error:
        respond(asking(url, api_key_env="ALLO_TEST_KEY"))
    said = str(error.value)
    assert f"sample.server.url: {url}: " in said and "correct it" in said and "secret" not in said


def test_more_responses_than_asked_for():
    with serving(lambda *_: (200, chosen("abcde"))) as (url, _):
        assert [answer.texts for answer in respond(asking(url))] == [["a", "b", "c"]] * 4


def test_requests_run_side_by_side():
    meeting = threading.Barrier(4)

    def reply(path, body):
        meeting.wait(5)
        return echo(path, body)

    with serving(reply) as (url, _):
        assert len(respond(asking(url, concurrency=4))) == 4


def test_other_tokens_are_said_once(caplog):
    with serving(echo) as (url, _):
        server = asking(url)
        respond(server)
        assert not caplog.records
        for _ in range(2):
            server.respond(CHAT, [8] * 4, 0, 0)
    (record,) = caplog.records
    assert f"{url}: it reads 7 tokens of a prompt that has 8 here" in record.message


def test_prompts_as_requests():
    chat = Prompts(byte_level("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML))
    assert chat.request("Hi?") == {"messages": [{"role": "user", "content": "Hi?"}]}
    begun = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "So"}]
    assert chat.request(begun) == {"prompt": chat.tokenizer.decode(chat.encode_prompt(begun))}
    chat.template_kwargs = {"enable_thinking": False}
    assert chat.request(begun[:1])["chat_template_kwargs"] == {"enable_thinking": False}
    plain = Prompts(character_tokenizer(), template="{}=")
    assert plain.request("2+2", suffix=" ") == {"prompt": "2+2= "}


@pytest.fixture
def job(tmp_path):
    """A configuration of arithmetic with a base at hand, and a function that runs a command on it."""
    tokenizer = character_tokenizer()
    save_model(tiny_llama(vocab_size=len(tokenizer)), tokenizer, tmp_path / "base")
    settings = {
        "name": "run",
        "output_dir": str(tmp_path / "runs"),
        "model": {"name_or_path": str(tmp_path / "base"), "dtype": "float32"},
        "data": {"train": "arithmetic:train[:9]", "test": "arithmetic:test[:2]", "prompt_template": "{}="},
        "sample": {"engine": "server", "num_return_sequences": 2, "max_new_tokens": 9},
    }
    (path := tmp_path / "job.yaml").write_text(json.dumps(settings))

    def command(name, url, *words):
        server = [f"sample.server.url={url}", "sample.server.concurrency=1", "sample.server.retries=0"]
        return main([name, str(path), *server, *words])

    return tmp_path / "runs/run/02-sample/seed-0/responses.jsonl", command


def answers_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_samples_from_a_server_and_goes_on_where_it_ended(job, capsys):
    path, command = job
    count = []

    def dies(_, body):
        count.append(body)
        return echo_answer(body) if len(count) <= 5 else (500, b"")

    def echo_answer(body):
        return 200, chosen([f"The answer is {body['seed'] % 10}", ""], chat=False)

    with serving(dies) as (url, _):
        assert command("sample", url) == 2
    assert f"sample.server.url: {url}: status 500; 1 tries" in capsys.readouterr().err
    with serving(lambda _, body: echo_answer(body)) as (url, asked):
        assert command("sample", url) == 0
        prompts = [body["prompt"] for _, body, _ in asked]
    rows = answers_of(path)
    assert len(rows) == 9 and len(prompts) == 5, "four were whole"
    assert [row["prompt"] + "=" for row in rows[4:]] == sorted(prompts, key=[row["prompt"] + "=" for row in rows].index)
    assert all(row["responses"][0]["text"].startswith("The answer is") for row in rows)
    assert all(row["unusable"] == ["the server gave an empty text"] for row in rows)


def test_the_key_comes_from_the_environment(job, monkeypatch, capsys):
    _, command = job
    with serving(echo) as (url, asked):
        for name in ("sample", "check"):
            assert command(name, url, "sample.server.api_key_env=ALLO_TEST_KEY") == 2
            said = capsys.readouterr()
            assert "sample.server.api_key_env: ALLO_TEST_KEY: not set" in said.err + said.out
        assert not asked
        for wrong in ("se\ncret", "secr\u00e9t"):
            monkeypatch.setenv("ALLO_TEST_KEY", wrong)
            assert command("check", url, "sample.server.api_key_env=ALLO_TEST_KEY") == 2
            said = "".join(capsys.readouterr())
            assert "ALLO_TEST_KEY: no key: it has other signs than printable ASCII" in said and "cr" not in said
        monkeypatch.setenv("ALLO_TEST_KEY", "secret\n")  # as files end
        assert command("sample", url, "sample.server.api_key_env=ALLO_TEST_KEY") == 0
        assert {headers["Authorization"] for _, _, headers in asked} == {"Bearer secret"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["sample.server.url=null"], "sample.engine: server needs sample.server.url"),
        (["sft={}"], "sample.engine: server needs .* no sft"),
        (["data.format=preference"], "sample.engine: server: data.format: preference has its responses"),
        (["data.format=multiple_choice"], "sample.engine: server: data.format: multiple_choice has its responses"),
        (["sample.server.url=localhost:8000"], "sample.server.url: "),
        (["sample.server.url=file:///etc/passwd"], "sample.server.url: "),
    ],
)
def test_configurations_that_cannot_be(job, words, said, capsys):
    assert job[1]("check", "http://localhost:1/v1", *words) == 2
    assert re.search(said, capsys.readouterr().err)


with_serve = pytest.mark.skipif(not is_serve_available(), reason="transformers serve needs fastapi, uvicorn and openai")


@contextmanager
def transformers_serving():
    """A real server on loopback, of whatever model it is asked for."""
    port = _free_port()
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    code = "from transformers.cli.transformers import main; main()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


@with_serve
def test_transformers_serve(tmp_path, caplog):
    """A tiny model: the server refuses `n`, and reads the prompts that we read."""
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML)
    save_model(tiny_llama(vocab_size=len(tokenizer)), tokenizer, base := tmp_path / "base")
    prompts = Prompts(tokenizer)
    with transformers_serving() as url:
        server = asking(url, samples=2, model=str(base), timeout=60, retries=60)
        requests = [prompts.request("Hi?"), {"prompt": "So it is"}]
        lengths = [len(prompts.encode_prompt("Hi?")), len(tokenizer("So it is").input_ids)]
        answers = server.respond(requests, lengths, 0, 0)
        assert server.respond(requests, lengths, 0, 0) == answers, "seeds of requests decide"
    assert server.said_singly and [len(answer.texts) + len(answer.reasons) for answer in answers] == [2, 2]
    assert any(answer.texts for answer in answers) and not any(
        "it reads" in record.message for record in caplog.records
    )


def _free_port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        return server.server_port
