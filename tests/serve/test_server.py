"""The official client against a real server on loopback."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest

from mobillama.data.template import ChatTemplate
from mobillama.data.tokenizer import load_tokenizer
from mobillama.engine.load import load_engine
from mobillama.engine.sampling import Sampling
from mobillama.engine.stream import Session, stream_tokens, text_of
from serve_support import serving

ASK = [{"role": "user", "content": "Tell me of the old house"}]


@pytest.fixture(scope="module")
def server(chat_model):
    with serving(chat_model, "--slots", 4, "--queue", 4) as address:
        yield address


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60)


def chat(client, **options):
    facts = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(**facts | options)


def post(server, body, headers=None, path="/v1/chat/completions"):
    """Return status, headers and content of a request sent as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server + path, content, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def metric(server, name):
    with urllib.request.urlopen(f"{server}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"mobillama_{name} ")))


def expected_text(chat_model, tokens=12):
    engine, tokenizer = load_engine(chat_model)
    template = ChatTemplate.of(tokenizer)
    ids = template.encode(ASK, add_generation_prompt=True).ids
    drawn = list(stream_tokens(Session(engine), ids, template.stop_ids, Sampling(0), tokens, None))
    return ids, drawn, "".join(text_of(drawn, tokenizer))


def test_a_chat_is_what_the_engine_says_with_usage_and_the_weights_digest(client, chat_model):
    ids, drawn, text = expected_text(chat_model)
    answer = chat(client)
    assert answer.choices[0].message.content == text and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(drawn))
    digest = hashlib.sha256((chat_model / "model.safetensors").read_bytes()).hexdigest()
    assert answer.system_fingerprint == f"sha256:{digest}"
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny" and model.mobillama["digest"] == f"sha256:{digest}"


def test_a_stream_adds_up_to_the_whole_answer(client, chat_model):
    _, drawn, text = expected_text(chat_model)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(drawn)
    assert all(chunk.usage is None for chunk in chat(client, stream=True))


def test_a_stream_on_the_wire_ends_with_done(server):
    body = {"model": "tiny", "messages": ASK, "max_tokens": 2, "stream": True}
    status, headers, content = post(server, body)
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    assert content.endswith(b"data: [DONE]\n\n")
    assert all(part.startswith(b"data: ") for part in content.split(b"\n\n")[:-1])


def test_completions_continue_texts_and_ids(client, chat_model):
    tokenizer = load_tokenizer(chat_model / "tokenizer.json")
    engine, _ = load_engine(chat_model)
    (ids,) = tokenizer.encode(["The old house"])
    drawn = list(stream_tokens(Session(engine), ids, {tokenizer.eos_id}, Sampling(0), 8, None))
    text = "".join(text_of(drawn, tokenizer))
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    for prompt in ("The old house", ids):
        assert client.completions.create(prompt=prompt, **options).choices[0].text == text
    both = client.completions.create(prompt=["The old house", "A ship"], n=2, **options)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == text != both.choices[2].text
    streamed = client.completions.create(prompt="The old house", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    assert len(client.completions.create(prompt="A", model="tiny").choices[0].text) > 0


def test_log_probabilities_are_those_of_the_model(client, chat_model):
    ids, drawn, _ = expected_text(chat_model, 5)
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=5).choices[0].logprobs.content
    assert len(answer) == 5
    engine, tokenizer = load_engine(chat_model)
    logits = engine.feed(ids).astype(float)
    values = logits - np.log(np.exp(logits).sum())
    assert answer[0].logprob == pytest.approx(values[drawn[0]], abs=1e-3)
    assert bytes(answer[0].bytes) == tokenizer.token_bytes[drawn[0]]
    assert [entry.logprob for entry in answer[0].top_logprobs] == pytest.approx(sorted(values)[:-4:-1], abs=1e-3)
    streamed = [chunk.choices[0] for chunk in chat(client, logprobs=True, max_tokens=5, stream=True)]
    told = [entry.logprob for choice in streamed if choice.logprobs for entry in choice.logprobs.content]
    assert told == pytest.approx([entry.logprob for entry in answer], abs=1e-3)
    old = client.completions.create(model="tiny", prompt="A ship", max_tokens=3, logprobs=2).choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == 3 and len(old.top_logprobs[0]) == 2


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(client, chat_model):
    _, _, text = expected_text(chat_model, 40)
    stop = text[9:13]
    before = text[: text.index(stop)]
    answer = chat(client, max_tokens=40, stop=["never there", stop]).choices[0]
    assert (answer.message.content, answer.finish_reason) == (before, "stop")
    chunks = chat(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before


def test_a_seed_repeats_an_answer_and_choices_differ(client):
    def texts(**options):
        answer = chat(client, temperature=1.5, n=3, **options)
        return [choice.message.content for choice in answer.choices]

    assert texts(seed=4) == texts(seed=4) != texts(seed=9)
    assert len(set(texts(seed=4))) == 3
    assert texts() != texts()


def test_sampling_options_change_the_answer(client):
    penalised = chat(client, max_tokens=60, extra_body={"repetition_penalty": 5.0}).choices[0].message.content
    assert penalised != chat(client, max_tokens=60).choices[0].message.content
    likeliest = chat(client).choices[0].message.content
    for options in ({"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}, {"top_p": 1e-9}):
        assert chat(client, temperature=2, **options).choices[0].message.content == likeliest


def test_what_a_conversation_shares_with_the_last_is_not_computed_again(client, server):
    messages = [{"role": "user", "content": "one " * 60}]
    first = chat(client, messages=messages)
    before = metric(server, "prompt_tokens_reused_total")
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, ASK[0]]
    again = chat(client, messages=messages)
    reused = metric(server, "prompt_tokens_reused_total") - before
    assert first.usage.prompt_tokens - 2 <= reused < again.usage.prompt_tokens


def test_concurrent_streams_are_each_what_they_are_alone(client):
    asks = [[{"role": "user", "content": f"{word} " * count}] for count, word in enumerate("abcdefgh", 3)]

    def text_for(messages):
        chunks = chat(client, messages=messages, max_tokens=50, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    alone = [text_for(messages) for messages in asks]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text_for, asks)) == alone
    assert len(set(alone)) > 4


def test_a_full_queue_is_429_and_says_when_to_come_again(server):
    body = {"model": "tiny", "messages": ASK, "max_tokens": 300, "n": 4, "temperature": 0}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: post(server, body), range(6)))
    assert {status for status, *_ in answers} == {200, 429}
    _, headers, content = next(answer for answer in answers if answer[0] == 429)
    assert headers["Retry-After"] == "1" and json.loads(content)["error"]["code"] == "queue_full"


@pytest.mark.parametrize("stream", [True, False])
def test_killed_clients_free_their_slots(server, stream):
    body = json.dumps(
        {"model": "tiny", "messages": ASK, "max_tokens": 4000, "temperature": 0, "n": 4, "stream": stream}
    )
    host, port = server.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    with socket.create_connection((host, int(port))) as killed:
        killed.sendall(f"{head}{len(body)}\r\n\r\n{body}".encode())
        while metric(server, "requests_running") < 4:
            time.sleep(0.01)
    deadline = time.monotonic() + 2  # the answers themselves take much longer
    while metric(server, "requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_that_stops_tells_who_still_listens(chat_model):
    command = [sys.executable, "-u", "-m", "mobillama", "serve", chat_model, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        host, port = process.stdout.readline().split("http://")[1].split()[0].split(":")
        assert "is ready" in process.stdout.readline()
        body = json.dumps({"model": "tiny", "messages": ASK, "max_tokens": 4000, "temperature": 0, "stream": True})
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
        )
        with socket.create_connection((host, int(port)), timeout=30) as listening:
            listening.sendall(f"{head}{len(body)}\r\n\r\n{body}".encode())
            received = listening.recv(65536)
            process.send_signal(signal.SIGINT)
            assert "once more stops at once" in process.stdout.readline()
            process.send_signal(signal.SIGINT)  # the answer takes seconds; it is not waited for
            while part := listening.recv(65536):
                received += part
        assert b'data: {"error":{"message":"the server stops"' in received and received.endswith(b"\r\n0\r\n\r\n")
        assert process.wait(timeout=30) == 130 and process.stderr.read() == ""
    finally:
        process.kill()


@pytest.mark.parametrize(
    "change, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 99}, "n"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_fields_out_of_range_are_named(server, change, param):
    body = {"model": "tiny", "messages": ASK, "max_tokens": 2} | change
    status, _, content = post(server, body)
    error = json.loads(content)["error"]
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", "no JSON"),
        (b"[]", "no JSON object"),
        (b'{"model": "tiny", "temperature": NaN}', "NaN"),
        (b'{"model": "tiny", "temperature": -Infinity}', "Infinity"),
        (b'{"model": "tiny", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', "more than 2"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "no JSON"),
    ],
)
def test_bodies_that_are_no_request_are_400(server, content, words):
    status, _, answer = post(server, content)
    assert status == 400 and words in json.loads(answer)["error"]["message"]


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; 'tiny' is"):
        chat(client, model="gpt-4")
    with pytest.raises(
        openai.BadRequestError, match=r"maximum context length is 4096 tokens. Your prompt has \d{4,} tokens"
    ):
        chat(client, messages=[{"role": "user", "content": "word " * 9000}])
    with pytest.raises(openai.BadRequestError, match="max_tokens of 4090"):
        chat(client, max_tokens=4090)
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
        chat(client, extra_body={"temperatur": 1})
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="0…511"):
        client.completions.create(model="tiny", prompt=[5, 9999])
    for prompt in ("", [""], []):
        with pytest.raises(openai.BadRequestError, match="prompt"):
            client.completions.create(model="tiny", prompt=prompt)


def test_unknown_paths_and_methods_are_error_objects(server):
    for path, status in (("/v1/nothing", 404), ("/v1/models", 405), ("/../etc/passwd", 404)):
        found, _, content = post(server, {}, path=path)
        assert found == status and "message" in json.loads(content)["error"]


def test_metrics_count_what_was_done(server, client):
    before = metric(server, "generated_tokens_total")
    chat(client, max_tokens=7)
    assert metric(server, "generated_tokens_total") == before + 7
    assert metric(server, "first_token_seconds_count") > 0
