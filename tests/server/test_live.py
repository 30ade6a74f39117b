"""A server in a process of its own, and the clients that people use."""

import asyncio
import http.client
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest

pytest.importorskip("openai")

import openai

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from tests.server.conftest import Live, live
from tests.support.serving import LENGTH, wait_until

pytestmark = pytest.mark.slow

PROMPT = "def read_config(filename):\n"
MODEL = "easyspec-demo"


@pytest.fixture(scope="module")
def engine():
    speculative = SpeculativeConfig(num_speculative_tokens=3, verifier="coupled")
    return open_model(platform="cpu", speculative=speculative, max_length=LENGTH)


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text_of(engine, **sampling) -> str:
    (completion,) = engine.generate([PROMPT], SamplingParams(**sampling))
    return completion.text


def test_openais_client(client, engine):
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0.8, seed=3
    )
    expected = text_of(engine, temperature=0.8, seed=3, max_new_tokens=40)
    assert answer.choices[0].text == expected
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    messages = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=40, temperature=0.8, seed=3
    )
    assert chat.choices[0].message.content == expected


def test_openais_client_streams(client, engine):
    messages = [{"role": "user", "content": PROMPT}]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == text_of(engine, max_new_tokens=40)
    assert usage is not None
    assert usage.completion_tokens == 40


def test_openais_asynchronous_client(served, engine):
    async def ask(client, seed):
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=24, temperature=1, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(5)))

    texts = asyncio.run(ask_all())
    for seed, text in enumerate(texts):
        assert text == text_of(engine, temperature=1.0, seed=seed, max_new_tokens=24)


def test_openais_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a\n" * 500)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served, engine):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "temperature": 0})
    command = ["curl", "-sS", f"{served.url}/v1/completions", "-d", body]
    command += ["-H", "Content-Type: application/json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["choices"][0]["text"] == text_of(engine, max_new_tokens=8)


def test_a_client_that_leaves_frees_its_row(served, client):
    """Streams are left in the middle, and answers that are not streamed before their end."""
    body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0}
    for fields in ({"stream": True}, {}):
        before = served.metric("vllm:request_success_total")
        connections = [sent(served, body | fields) for _ in range(3)]  # one of them waits
        wait_until(lambda: served.metric("vllm:num_requests_running") == 2)
        for connection in connections:
            connection.close()
        wait_until(lambda: served.metric("vllm:num_requests_running") == 0)
        assert served.metric("vllm:num_requests_waiting") == 0
        # Freed early: none of them came to its end.
        assert served.metric("vllm:request_success_total") == before
    assert client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2).choices


def sent(served: Live, body: dict) -> socket.socket:
    """Send a request and return its connection."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_a_key_from_the_environment_and_what_is_not_served_yet():
    """The server listens while it compiles, and says that it is not ready."""
    with live(EASYSPEC_API_KEY="secret") as server:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.url}/health")
        assert caught.value.code == 503
        address = f"{server.url}/v1"
        client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0)
        with client, pytest.raises(openai.InternalServerError, match="loading"):
            client.completions.create(model=MODEL, prompt=PROMPT)
        client = openai.OpenAI(base_url=address, api_key="wrong")
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_second_signal_does_not_wait_for_a_grammar():
    """Trying this one takes all the ten seconds that a grammar gets."""
    patterns = [f"(a|b)*{c}(a|b){{{n}}}" for n in range(3, 20) for c in "ab"]
    schema = {"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]}
    body = json.dumps({"model": MODEL, "prompt": PROMPT, "json_schema": schema}).encode()
    with live() as server:
        server.read_until("ready")
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)

        def ask() -> None:
            with suppress(OSError, http.client.HTTPException):
                urllib.request.urlopen(request)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        thread.join(30)


def test_sigterm_loses_no_answer():
    """Two answers run, one waits; all three come, and nothing else is accepted."""
    with live() as server:
        server.read_until("ready")
        texts: list[str] = []

        def ask():
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
                answer = client.completions.create(
                    model=MODEL, prompt=PROMPT, max_tokens=200, temperature=0
                )
            texts.append(answer.choices[0].text)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        # In this order: before two run, one that waits may be either of those.
        wait_until(lambda: server.metric("vllm:num_requests_running") == 2)
        wait_until(lambda: server.metric("vllm:num_requests_waiting") == 1)
        lines = server.stop()
        for thread in threads:
            thread.join(30)
        assert len(texts) == 3
        assert len(set(texts)) == 1
        assert [line["status"] for line in lines if line["event"] == "request"] == [200] * 3
        with pytest.raises(OSError):
            urllib.request.urlopen(f"{server.url}/health")


def test_at_the_end_of_the_grace_answers_are_cut_short():
    with live("--grace", "0.1") as server:
        server.read_until("ready")
        body = {"prompt": PROMPT, "max_tokens": 230, "temperature": 1, "seed": 1, "stream": True}
        with sent(server, body) as connection:
            wait_until(lambda: server.metric("vllm:num_requests_running") == 1)
            lines = server.stop()
            received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        (record,) = [line for line in lines if line["event"] == "request"]
        assert (record["status"], record["finish"], record["timed_out"]) == (200, ["length"], 1)
        assert b"data: [DONE]" in received
