"""Tools in chats: what is offered, what is refused, and calls as OpenAI's own client sees them.

No model that is small enough for tests calls tools, so that the texts here are written by hand. A
thread of uvicorn serves them.
"""

import asyncio
import json
import socket
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("openai")

import openai
import uvicorn

from easyspec_jax import demo, open_model
from easyspec_jax.engine.completion import Completion, Gain
from easyspec_jax.engine.serving import Ended, Progress, Scheduler
from easyspec_jax.server.answering import Limits
from easyspec_jax.server.app import Settings, build
from tests.support.serving import wait_until
from tests.tokenizer.test_tool_calls import HERMES

MODEL = "scripted"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
CALLS = (
    "Let me add.\n",
    '<tool_call>\n{"name": "add", "argu',
    'ments": {"x": [2, 3]}}\n</tool',
    "_call>\n",
    '<tool_call>{"name": "add", "arguments": {"x": [4]}}</tool_call>',
)
AS_JSON = "{{ tools | tojson }}{{ messages | tojson }}"
ADDED = [("add", {"x": [2, 3]}), ("add", {"x": [4]})]


class Scripted(Scheduler):
    """Answers every request with the same text, in pieces, and remembers the prompts."""

    def __init__(self, engine):
        super().__init__(engine, rows=2, depth=2, seconds=60)
        self.state = "ready"
        self.pieces, self.reason, self.prompts = CALLS, "stop", []

    def submit(self, requests):
        for request in requests:
            text = request.text
            self.prompts.append(self.engine.tokenizer.decode(text.prompt_ids))
            for piece in self.pieces[:-1]:
                request.listener(Progress(Gain([piece], 0, 0), time.perf_counter()))
            completion = Completion(
                text.prompt,
                text.prompt_ids,
                [0] * len(self.pieces),
                "".join(self.pieces),
                self.reason,
                text.stats,
                [],
            )
            # The end of a text can come with the end, as after a stop string that did not come.
            request.listener(Ended(completion, self.pieces[-1]))


@pytest.fixture(scope="module")
def engine():
    return open_model(platform="cpu")


@pytest.fixture(params=[HERMES])
def scheduler(engine, request):
    engine.tokenizer.chat_template = request.param
    return Scripted(engine)


@pytest.fixture
def client(scheduler):
    application = build(scheduler, Settings(MODEL, Limits(1 << 16, 100)), lambda record: None)
    config = uvicorn.Config(application, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serve = server.serve(sockets=[listener])
        thread = threading.Thread(target=asyncio.run, args=(serve,), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            yield client
        server.should_exit = True
        thread.join(30)
        wait_until(lambda: not thread.is_alive())


def ask(client, **fields):
    fields = {"messages": [QUESTION], "tools": [TOOL]} | fields
    return client.chat.completions.create(model=MODEL, **fields)


def streamed(client, **fields):
    """Return content, calls and reason of a streamed answer, put together as clients do it."""
    content, calls, reason = "", [], None
    for chunk in ask(client, stream=True, **fields):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            if part.index == len(calls):
                assert part.id.startswith("call_")
                calls.append([part.function.name, ""])
            calls[part.index][1] += part.function.arguments
        reason = choice.finish_reason or reason
    return content, [(name, json.loads(arguments)) for name, arguments in calls], reason


def whole(client, **fields):
    (choice,) = ask(client, **fields).choices
    calls = choice.message.tool_calls or ()
    assert len({call.id for call in calls}) == len(calls)
    found = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
    return choice.message.content, found, choice.finish_reason


@pytest.mark.parametrize("read", [whole, streamed])
def test_calls_of_tools(client, scheduler, read):
    assert read(client) == ("Let me add.\n", ADDED, "tool_calls")
    assert scheduler.prompts == ["add user: What is 2 + 3? "]


def test_a_message_that_only_calls_has_no_content(client, scheduler):
    scheduler.pieces = CALLS[1:]
    assert whole(client) == (None, ADDED, "tool_calls")
    assert streamed(client) == ("", ADDED, "tool_calls")


@pytest.mark.parametrize("read", [whole, streamed])
def test_one_call_where_one_is_asked_for(client, read):
    answer = read(client, parallel_tool_calls=False)
    assert answer == ("Let me add.\n", ADDED[:1], "tool_calls")


@pytest.mark.parametrize("read", [whole, streamed])
def test_without_tools_a_text_is_a_text(client, scheduler, read):
    """Also where `tool_choice` takes them away."""
    text = "".join(CALLS)
    assert read(client, tools=openai.omit) == (text, [], "stop")
    assert read(client, tool_choice="none") == (text, [], "stop")
    assert scheduler.prompts == ["user: What is 2 + 3? "] * 2


@pytest.mark.parametrize("read", [whole, streamed])
def test_a_call_that_was_cut_off_is_text(client, scheduler, read):
    scheduler.pieces, scheduler.reason = CALLS[:2], "length"
    assert read(client) == ("".join(CALLS[:2]), [], "length")


def test_results_of_tools_reach_the_template(client, scheduler):
    answer = ask(client).choices[0].message
    result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "5"}
    ask(client, messages=[QUESTION, answer.model_dump(), result])
    call = '<tool_call>\n{"name": "add", "arguments": {"x": [2, 3]}}\n</tool_call>'
    assert call in scheduler.prompts[-1]
    assert scheduler.prompts[-1].endswith("tool: 5 ")


def test_traces_keep_the_text_of_every_token(client):
    chunks = list(ask(client, stream=True, extra_body={"easyspec": {"trace": True}}))
    pieces = [piece for one in chunks for piece in getattr(one, "easyspec", {}).get("pieces", ())]
    assert tuple(pieces) == CALLS[:-1]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "any"}, "tool_choice", "'any' is not supported"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "tool_choice",
            "'sub' needs a function of tools",
        ),
        ({"tools": [{"type": "custom"}]}, "tools", "'custom' are not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "must be a list of"),
        ({"tools": ["add"]}, "tools", "must be a list of"),
        ({"tools": [{"function": {"name": "add"}}]}, "tools", "must be a list of"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "of the wrong type"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, fields, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize("scheduler", [demo.CHAT_TEMPLATE], indirect=True)
def test_tools_that_the_template_would_drop_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="does not show them") as caught:
        ask(client)
    assert caught.value.param == "tools"
    assert whole(client, tool_choice="none")[0] == "".join(CALLS)


@pytest.mark.parametrize(
    "scheduler", ["{{ tools | tojson }}{{ messages | tojson }}"], indirect=True
)
def test_calls_in_other_forms_come_as_text(client):
    assert whole(client) == ("".join(CALLS), [], "stop")
    # Nor can they be demanded.
    with pytest.raises(openai.BadRequestError, match="in a form that is not known") as caught:
        ask(client, tool_choice="required")
    assert caught.value.param == "tool_choice"
