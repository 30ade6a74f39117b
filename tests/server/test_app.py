"""The application in this process: forms of answers, limits and refusals."""

import json
import re
import threading
from functools import partial

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from starlette.testclient import TestClient

from easyspec_jax import SamplingParams
from easyspec_jax.engine.serving import Request
from easyspec_jax.server.answering import Answering, Limits
from easyspec_jax.server.app import PAGE, Settings, build, log_line
from tests.support.serving import DEPTH, LENGTH, ROWS, wait_until
from tests.tokenizer.test_tool_calls import HERMES

pytestmark = pytest.mark.slow

MODEL = "pair"
PROMPT = "def read_config(filename):\n"
LIMITS = Limits(body=5000, tokens=200)


@pytest.fixture
def log():
    return []


@pytest.fixture
def client(scheduler, log):
    application = build(scheduler, Settings(MODEL, LIMITS), log.append)
    with TestClient(application, base_url="http://127.0.0.1", raise_server_exceptions=False) as it:
        yield it
    wait_until(lambda: scheduler.running == scheduler.waiting == 0)


def post(client, path, body):
    """Send a body that other libraries would not write: with lone surrogates, for example."""
    headers = {"Content-Type": "application/json"}
    return client.post(path, content=json.dumps(body), headers=headers)


def complete(client, **fields):
    return post(client, "/v1/completions", {"prompt": PROMPT, "temperature": 0} | fields)


def chat(client, **fields):
    messages = [{"role": "user", "content": PROMPT}]
    return post(client, "/v1/chat/completions", {"messages": messages, "temperature": 0} | fields)


def events(response):
    """Return the chunks of a stream, which must end as OpenAI's do."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = re.findall(r"data: (.*)\n\n", response.text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def alone(scheduler, **sampling):
    (completion,) = scheduler.engine.generate([PROMPT], SamplingParams(**sampling))
    return completion


def test_a_completion(client, scheduler, log):
    answer = complete(client, max_tokens=20, model=MODEL).json()
    expected = alone(scheduler, max_new_tokens=20)
    assert answer["choices"] == [
        {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length"}
    ]
    assert (answer["object"], answer["model"]) == ("text_completion", MODEL)
    prompt = len(expected.prompt_ids)
    assert 0 <= answer["usage"].pop("prompt_tokens_details")["cached_tokens"] < prompt
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 20,
        "total_tokens": prompt + 20,
    }
    (record,) = log
    assert record["status"] == 200
    assert record["completion_tokens"] == 20
    assert 0 <= record["acceptance_rate"] <= 1
    assert PROMPT not in json.dumps(record)


def test_a_chat_is_rendered_with_the_template(client, scheduler):
    # The bundled pair's template writes a first message as it is.
    (choice,) = chat(client, max_tokens=12).json()["choices"]
    expected = alone(scheduler, max_new_tokens=12).text
    assert choice["message"] == {"role": "assistant", "content": expected}


def test_a_streamed_chat_is_the_whole_one(client):
    whole = chat(client, max_tokens=30).json()
    chunks = events(
        chat(client, max_tokens=30, stream=True, stream_options={"include_usage": True})
    )
    *parts, usage = chunks
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["choices"][0]["message"]["content"]
    assert [part["choices"][0]["finish_reason"] for part in parts if not part["usage"]][-1] == (
        "length"
    )
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert len({part["id"] for part in chunks}) == 1


def test_streams_say_which_tokens_were_drafted_where_asked(client, scheduler):
    chunks = events(complete(client, max_tokens=30, stream=True, easyspec={"trace": True}))
    *grown, end = chunks
    pieces = [piece for chunk in grown for piece in chunk["easyspec"]["pieces"]]
    assert len(pieces) == 30
    assert "".join(pieces) == alone(scheduler, max_new_tokens=30).text
    stats = end["easyspec"]["stats"]
    assert sum(chunk["easyspec"]["accepted"] for chunk in grown) == stats["accepted"] > 0
    assert "easyspec" not in events(complete(client, max_tokens=4, stream=True))[0]


def test_plain_decoding_is_served_for_comparison(client):
    ways = [
        complete(client, max_tokens=15, easyspec={"plain": plain, "trace": True}).json()
        for plain in (False, True)
    ]
    assert ways[0]["choices"] == ways[1]["choices"]
    drafted = [way["easyspec"]["stats"][0]["drafted"] for way in ways]
    assert drafted[0] > drafted[1] == 0


def test_a_second_turn_reuses_the_first(client, scheduler):
    prompt = PROMPT * 6
    first = complete(client, prompt=prompt, max_tokens=20).json()
    longer = prompt + first["choices"][0]["text"] + "\n    return"
    second = complete(client, prompt=longer, max_tokens=20).json()
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > first["usage"]["prompt_tokens"] // 2
    # Plain decoding keeps nothing, and gives the same text.
    (plain,) = scheduler.plain.generate([longer], SamplingParams(max_new_tokens=20))
    assert plain.stats.cached_tokens == 0
    assert second["choices"][0]["text"] == plain.text


def test_several_answers_have_seeds_of_their_own(client, scheduler):
    fields = {"temperature": 0.9, "seed": 5, "max_tokens": 8}
    answer = complete(client, prompt=[PROMPT, PROMPT], n=2, **fields).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for number, text in enumerate(texts):
        assert text == alone(scheduler, temperature=0.9, seed=5 + number, max_new_tokens=8).text
    assert answer["usage"]["completion_tokens"] == 32


def test_a_stop_string_ends_an_answer(client, scheduler):
    whole = alone(scheduler, max_new_tokens=40).text
    stop = whole[20:24]
    (choice,) = complete(client, max_tokens=40, stop=[stop]).json()["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    parts = events(complete(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]


def test_token_ids_are_prompts_too(client, scheduler):
    ids = scheduler.engine.encode(PROMPT)
    one = complete(client, prompt=ids, max_tokens=6).json()
    assert one["choices"][0]["text"] == alone(scheduler, max_new_tokens=6).text
    many = scheduler.engine.target.config.vocab_size
    assert "does not know" in complete(client, prompt=[many]).json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "message"),
    [
        ({"max_tokens": 201}, 400, None, "200 tokens at most"),
        ({"prompt": "a\n" * 400}, 400, "context_length_exceeded", "together more than"),
        ({"prompt": ""}, 400, None, "empty"),
        ({"prompt": "\ud800"}, 400, None, "not valid Unicode"),
        ({"model": "\ud800other"}, 404, "model_not_found", "does not exist"),
        ({"n": ROWS + DEPTH + 1}, 400, None, "6 answers are more than the 5 places"),
        ({"logprobs": 21}, 400, None, "logprobs 21 must be from 0 to 20"),
        ({"top_logprobs": 2}, 400, None, "top_logprobs needs logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, None, "top_logprobs 21 must be from 0"),
        ({"logit_bias": {"99999": 1}}, 400, None, "logit_bias names id 99999"),
        ({"presence_penalty": 3}, 400, None, "presence_penalty 3.0 must be from -2 to 2"),
        ({"bad_words": ["a" * 200]}, 400, None, "bad_words may be 64 sequences of up to 9 tokens"),
        ({"guided_regex": "("}, 400, None, "guided_regex cannot be used: unclosed group"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            400,
            None,
            "response_format cannot be used: Unimplemented keys",
        ),
    ],
)
def test_what_cannot_be_done_is_one_error(client, log, fields, status, code, message):
    response = complete(client, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert message in error["message"]
    assert (log[-1]["status"], log[-1]["error"]) == (status, error["message"])


@pytest.mark.slow
def test_sampling_options_of_a_request(client, scheduler):
    """The text is that of the library, next to one without options."""
    fields = {"max_tokens": 20, "temperature": 1, "seed": 3, "n": 2, "repetition_penalty": 1.4}
    fields |= {"logit_bias": {"300": 2}, "min_tokens": 18, "bad_words": ["return", "def"]}
    answer = complete(client, **fields).json()
    plain = complete(client, max_tokens=20).json()
    for number, choice in enumerate(answer["choices"]):
        expected = alone(
            scheduler,
            temperature=1.0,
            seed=3 + number,
            max_new_tokens=20,
            repetition_penalty=1.4,
            logit_bias={300: 2.0},
            min_new_tokens=18,
            bad_words=("return", "def"),
        )
        assert choice["text"] == expected.text
    assert plain["choices"][0]["text"] == alone(scheduler, max_new_tokens=20).text


def test_logprobs_of_a_completion(client, scheduler):
    """They are the library's, next to a request without any, and a stream has the same."""
    (choice,) = complete(client, max_tokens=20, logprobs=3).json()["choices"]
    expected = alone(scheduler, max_new_tokens=20, logprobs=3)
    found = choice["logprobs"]
    assert choice["text"] == "".join(found["tokens"]) == expected.text
    listed = [one.logprob for one in expected.logprobs]
    assert found["token_logprobs"] == pytest.approx(listed, abs=1e-5)
    best = [max(tokens, key=tokens.get) for tokens in found["top_logprobs"]]
    assert best == found["tokens"]  # greedy
    assert {len(tokens) for tokens in found["top_logprobs"]} == {3}
    starts = zip(found["text_offset"], found["tokens"], strict=True)
    assert all(choice["text"][at:].startswith(token) for at, token in starts)
    chunks = events(complete(client, max_tokens=20, logprobs=3, stream=True))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert streamed.pop() is None  # that of the end
    for field in ("tokens", "text_offset"):
        assert [one for chunk in streamed for one in chunk[field]] == found[field]


def test_logprobs_of_a_chat(client, scheduler):
    answer = chat(client, max_tokens=16, logprobs=True, top_logprobs=2, temperature=1, seed=4)
    (choice,) = answer.json()["choices"]
    expected = alone(scheduler, max_new_tokens=16, logprobs=2, temperature=1.0, seed=4)
    content = choice["logprobs"]["content"]
    spelled = b"".join(bytes(token["bytes"]) for token in content)
    assert spelled.decode() == choice["message"]["content"] == expected.text
    for token, one in zip(content, expected.logprobs, strict=True):
        assert token["logprob"] == pytest.approx(one.logprob, abs=1e-5)
        assert [best["logprob"] for best in token["top_logprobs"]] == pytest.approx(
            [logprob for _, logprob in one.top], abs=1e-5
        )
    plain = chat(client, max_tokens=16, logprobs=True, easyspec={"plain": True}).json()
    assert len(plain["choices"][0]["logprobs"]["content"]) == 16
    assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_logprobs_of_a_text_that_a_stop_string_ends(client, scheduler):
    """Every token of the answer has one, those of the stop string too."""
    whole = alone(scheduler, max_new_tokens=40).text
    fields = {"max_tokens": 40, "stop": whole[20:24], "logprobs": 0}
    answer = complete(client, **fields).json()
    tokens = answer["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == answer["usage"]["completion_tokens"]
    chunks = events(complete(client, stream=True, **fields))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [token for part in parts if part for token in part["tokens"]] == tokens


def test_a_grammar_of_a_request(client, scheduler):
    """The text is that of the library, whole and streamed, and the draft keeps to the grammar."""
    pytest.importorskip("llguidance")
    choices = ["open(filename)", "None", "close_the_file_that_was_opened()"]
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "tags": {"enum": ["x", "y"]}},
        "required": ["ok", "tags"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    one = complete(client, max_tokens=40, structured_outputs={"choice": choices}).json()
    expected = alone(scheduler, max_new_tokens=40, choice=tuple(choices))
    assert one["choices"][0]["text"] == expected.text
    assert expected.text in choices
    assert one["choices"][0]["finish_reason"] == "stop"
    answer = chat(client, max_tokens=60, response_format=form).json()
    text = answer["choices"][0]["message"]["content"]
    value = json.loads(text)
    assert (type(value["ok"]), value["tags"] in ("x", "y")) == (bool, True)
    streamed = events(chat(client, max_tokens=60, response_format=form, stream=True))
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in streamed) == text
    traced = complete(
        client, max_tokens=40, guided_choice=choices[2:], easyspec={"trace": True}
    ).json()
    (stats,) = traced["easyspec"]["stats"]
    assert stats["accepted"] == stats["drafted"] > 0


def test_calls_of_tools_that_are_demanded(scheduler, monkeypatch):
    """A model that never learnt to call tools does, with and without the draft alike."""
    pytest.importorskip("llguidance")
    monkeypatch.setattr(scheduler.engine.tokenizer, "chat_template", HERMES)
    place = {"enum": ["Rome", "Oslo"]}
    schema = {"type": "object", "properties": {"city": place}, "additionalProperties": False}
    schema["required"] = ["city"]
    functions = [{"name": "weather", "parameters": schema}, {"name": "time"}]
    tools = [{"type": "function", "function": function} for function in functions]
    named = {"type": "function", "function": {"name": "weather"}}
    with TestClient(
        build(scheduler, Settings(MODEL, LIMITS), [].append), base_url="http://127.0.0.1"
    ) as client:
        ask = partial(chat, client, max_tokens=60, tools=tools, parallel_tool_calls=False)
        answers = [ask(tool_choice=named, easyspec={"plain": way}).json() for way in (False, True)]
        sampled = ask(tool_choice="required", temperature=1, seed=2).json()
        streamed = events(ask(tool_choice=named, stream=True))
    (choice,) = answers[0]["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    functions = [answer["choices"][0]["message"]["tool_calls"][0]["function"] for answer in answers]
    assert functions[0] == functions[1]
    assert functions[0]["name"] == "weather"
    assert json.loads(functions[0]["arguments"])["city"] in place["enum"]
    (call,) = sampled["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] in ("weather", "time")
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed]
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert call["function"] == functions[0]


def test_strict_tools_bind_calls_and_not_what_else_is_said(scheduler, monkeypatch):
    pytest.importorskip("llguidance")
    monkeypatch.setattr(scheduler.engine.tokenizer, "chat_template", HERMES)
    tools = [{"type": "function", "function": {"name": "now", "strict": True}}]
    with TestClient(
        build(scheduler, Settings(MODEL, LIMITS), [].append), base_url="http://127.0.0.1"
    ) as client:
        texts = [
            chat(client, max_tokens=20, tools=one).json()["choices"][0]["message"]["content"]
            for one in (tools, [{"type": "function", "function": {"name": "now"}}])
        ]
    assert texts[0] == texts[1] != ""


def test_calls_are_not_demanded_of_templates_that_write_none(client):
    tool = {"type": "function", "function": {"name": "now"}}
    response = chat(client, tools=[tool], tool_choice="required")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"  # the template does not show them either


def test_tokens_that_are_asked_for_must_fit(client):
    assert complete(client, prompt="a\n" * 60, max_tokens=LIMITS.tokens).status_code == 400


def test_bodies_have_a_limit_and_a_type(client):
    large = client.post(
        "/v1/completions",
        content=b" " * (LIMITS.body + 1),
        headers={"Content-Type": "application/json"},
    )
    assert large.status_code == 413
    form = client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert form.status_code == 415
    assert "Content-Type" in form.json()["error"]["message"]


def test_a_request_that_allows_no_token_is_its_clients_fault(client):
    """The grammar wants the end where `min_tokens` forbids it."""
    pytest.importorskip("llguidance")
    response = complete(client, guided_regex="a", min_tokens=5, max_tokens=8)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.startswith("no token may follow here by regex and the other options")
    assert "demo" not in message


def test_a_log_that_cannot_be_written_costs_no_answer(monkeypatch):
    class Full:
        def write(self, text):
            raise OSError("no space left")

    monkeypatch.setattr("sys.stderr", Full())
    log_line({"event": "request"})


def test_prompts_that_are_being_encoded_take_places(client, scheduler, monkeypatch):
    encoding, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(
        Answering, "_encoded", lambda *_: encoding.set() or go_on.wait(30) or pytest.fail("late")
    )
    monkeypatch.setattr(scheduler, "depth", 0)
    waiting = threading.Thread(target=complete, args=(client,), kwargs={"n": ROWS})
    waiting.start()
    assert encoding.wait(30)
    assert complete(client).status_code == 429
    monkeypatch.undo()
    go_on.set()
    waiting.join(30)


def test_a_full_queue_says_when_to_come_again(client, scheduler):
    row = scheduler.engine.row(PROMPT, SamplingParams(max_new_tokens=200))
    places = [
        Request(scheduler.engine, scheduler.engine.row(PROMPT, row.sampling), lambda event: None)
        for _ in range(ROWS + DEPTH)
    ]
    scheduler.submit(places)
    response = complete(client)
    for place in places:
        scheduler.cancel(place)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "rate_limit_exceeded"


def test_before_it_is_ready_it_says_so(client, scheduler, monkeypatch):
    assert client.get("/health").json() == {"status": "ready"}
    monkeypatch.setattr(scheduler, "state", "loading")
    assert client.get("/health").status_code == 503
    response = complete(client)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert "retry-after" in response.headers


def test_a_key_is_asked_for_where_there_is_one(scheduler):
    application = build(scheduler, Settings(MODEL, LIMITS, api_key="ключ"), lambda record: None)
    with TestClient(application, base_url="http://localhost") as client:
        for given in ([], [(b"Authorization", b"Bearer wrong")], [(b"Authorization", b"\xff")]):
            response = client.get("/v1/models", headers=given)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        key = [(b"Authorization", "Bearer ключ".encode())]
        assert client.get("/v1/models", headers=key).status_code == 200
        # What monitors and browsers ask for needs none.
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_names_of_other_machines_are_refused(scheduler):
    """A page's own name can be made to point to this machine, and then its scripts reach us."""
    local = build(scheduler, Settings(MODEL, LIMITS), lambda record: None)
    anywhere = build(scheduler, Settings(MODEL, LIMITS, local=False), lambda record: None)
    own = [("localhost:8000", 200), ("[::1]:8000", 200), ("127.0.0.2:8000", 200)]
    for name, status in (("evil.example", 403), ("127.0.0.1.evil.example", 403), *own):
        assert TestClient(local).get("/health", headers={"Host": name}).status_code == status
        assert TestClient(anywhere).get("/health", headers={"Host": name}).status_code == 200


def test_the_model_is_described(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, LENGTH)
    assert model["easyspec"]["num_speculative_tokens"] == 3
    assert client.get(f"/v1/models/{MODEL}").json() == model
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)]
)
def test_unknown_addresses_are_errors_in_openais_form(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_metrics_have_vllms_names(client):
    complete(client, max_tokens=30)
    text = client.get("/metrics").text
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    label = f'{{model_name="{MODEL}"}}'
    assert values[f"vllm:generation_tokens_total{label}"] == 30
    drafts = values[f"vllm:spec_decode_num_drafts_total{label}"]
    accepted = values[f"vllm:spec_decode_num_accepted_tokens_total{label}"]
    assert drafts <= values[f"vllm:spec_decode_num_draft_tokens_total{label}"] <= 3 * drafts
    assert accepted == sum(
        value
        for name, value in values.items()
        if name.startswith("vllm:spec_decode_num_accepted_tokens_per_pos_total")
    )
    by_tier = f'{{model_name="{MODEL}",num_speculative_tokens="3"}}'
    assert values[f"easyspec:rounds_total{by_tier}"] >= drafts
    assert values[f"easyspec:accepted_tokens_total{by_tier}"] == accepted
    assert values[f"easyspec:lookup_accepted_tokens_total{label}"] == 0
    assert values[f"vllm:time_to_first_token_seconds_count{label}"] == 1
    assert values[f"vllm:inter_token_latency_seconds_count{label}"] == 29
    assert values[f"vllm:num_requests_running{label}"] == 0
    ended = f'vllm:request_success_total{{finished_reason="length",model_name="{MODEL}"}}'
    assert values[ended] == 1


@pytest.mark.parametrize("path", PAGE)
def test_the_page_needs_nothing_from_elsewhere(client, path):
    response = client.get(path)
    assert response.status_code == 200
    assert "default-src 'none'" in response.headers["content-security-policy"]
    addresses = set(re.findall(r"https?://[\w./]+", response.text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in response.text
