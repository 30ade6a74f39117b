"""Bodies of all kinds: never status 5xx, never a stack trace, never a row that stays taken."""

import json
import re

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from easyspec_jax import SamplingParams
from easyspec_jax.server.answering import Limits
from easyspec_jax.server.app import Settings, build
from tests.server.test_protocol import FIELDS, JSON, TOOL
from tests.support.serving import wait_until
from tests.tokenizer.test_tool_calls import HERMES

pytestmark = pytest.mark.slow

PROMPT = "def f(x):"
ADDRESSES = {"chat": "/v1/chat/completions", "text": "/v1/completions"}
LIMITS = Limits(body=5000, tokens=200)

TEXTS = st.sampled_from(
    ["", "a", "def f", "\n", "\x00", "\ud800", "🐍é", "<tool_call>", "a\n" * 300]
)
IDS = st.lists(st.sampled_from([0, 1, 300, 5000, 2**40, -1]), max_size=4)
COUNTS = st.sampled_from([-1, 0, 1, 2, 5, 64, 65, 2**31, 2**70, True, 1.0, "2"])
NUMBERS = st.sampled_from([-2, -0.1, 0, 0.3, 1, 1.0, 2, 100, 1e308, 10**400, "0.5", True])
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "x", ""])},
    optional={
        "content": TEXTS
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})),
        "tool_calls": st.lists(st.just({"function": {"name": "f", "arguments": "{}"}}) | JSON),
        "name": TEXTS,
    },
)
LIKELY = {
    "prompt": TEXTS | IDS | st.lists(TEXTS | IDS, max_size=3),
    "messages": st.lists(MESSAGES, max_size=3),
    "model": st.sampled_from(["pair", "other"]),
    "max_tokens": st.sampled_from([1, 2, 3, 8]) | COUNTS,
    "max_completion_tokens": COUNTS,
    "n": st.sampled_from([1, 2, 3]) | COUNTS,
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "top_k": COUNTS,
    "min_p": NUMBERS,
    "min_tokens": COUNTS,
    "seed": COUNTS,
    "stop": TEXTS | st.lists(TEXTS, max_size=3),
    "stop_token_ids": IDS,
    "bad_words": st.lists(TEXTS, max_size=3),
    "logit_bias": st.dictionaries(st.sampled_from(["0", "300", "5000", "-1", "x"]), NUMBERS),
    "presence_penalty": NUMBERS,
    "frequency_penalty": NUMBERS,
    "repetition_penalty": NUMBERS,
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "easyspec": st.fixed_dictionaries({"trace": st.booleans(), "plain": st.booleans()}),
    "tools": st.lists(st.just(TOOL) | JSON, max_size=2),
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function"}]),
    "parallel_tool_calls": st.booleans(),
}  # fmt: skip
"""Values of each field that are valid or nearly so, because noise is refused at the first check."""


@st.composite
def bodies(draw, kind):
    """Return the bytes of a body, which in one of four cases are damaged."""
    base = (
        {"messages": [{"role": "user", "content": PROMPT}]} if kind == "chat" else {"prompt": "a"}
    )
    names = draw(st.lists(st.sampled_from([*LIKELY]), max_size=5))
    likely = {name: draw(LIKELY[name]) for name in names}
    noise = draw(st.just({}) | st.dictionaries(FIELDS, JSON, max_size=2))
    body = json.dumps(base | {"max_tokens": 2} | likely | noise).encode()
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(body)))
        body = body[:place] + draw(st.binary(max_size=4)) + body[place + draw(st.integers(0, 4)) :]
    return body


@pytest.fixture(scope="module", params=["bundled", "with tools"])
def client(scheduler, request):
    before = scheduler.engine.tokenizer.chat_template
    if request.param == "with tools":
        scheduler.engine.tokenizer.chat_template = HERMES
    application = build(scheduler, Settings("pair", LIMITS), lambda record: None)
    with TestClient(application, base_url="http://127.0.0.1", raise_server_exceptions=False) as it:
        yield it
    scheduler.engine.tokenizer.chat_template = before


def check(client, scheduler, kind, body):
    """Send a body: it is answered or refused in OpenAI's form, and leaves no row behind."""
    response = client.post(
        ADDRESSES[kind], content=body, headers={"Content-Type": "application/json"}
    )
    assert scheduler.failure is None, (scheduler.failure, body)
    assert response.status_code in (200, 400, 404, 413), (response.text, body)
    assert "Traceback" not in response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"
    elif response.headers["content-type"].startswith("text/event-stream"):
        *chunks, done = re.findall(r"data: (.*)\n\n", response.text)
        assert done == "[DONE]"
        assert not any("error" in json.loads(chunk) for chunk in chunks)
    else:
        assert response.json()["choices"]
    wait_until(lambda: scheduler.running == scheduler.waiting == 0)


def check_all(client, scheduler, count):
    """Send many bodies, and then ask for a text as if nothing had happened."""

    @given(
        st.sampled_from([*ADDRESSES]).flatmap(lambda kind: st.tuples(st.just(kind), bodies(kind)))
    )
    # Without shrinking: a fault can end the engine, and then any body is one.
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    def every(request):
        check(client, scheduler, *request)

    every()
    fields = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    (completion,) = scheduler.engine.generate([PROMPT], SamplingParams(max_new_tokens=20))
    answer = client.post("/v1/completions", json=fields).json()
    assert answer["choices"][0]["text"] == completion.text


def test_no_body_is_a_fault(client, scheduler):
    check_all(client, scheduler, 50)


@pytest.mark.exhaustive
def test_none_of_500_bodies_is_a_fault(client, scheduler):
    check_all(client, scheduler, 500)
