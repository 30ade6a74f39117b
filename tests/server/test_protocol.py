"""Bodies of requests: what they mean, and one error in OpenAI's form for everything else."""

import json
from dataclasses import replace
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from easyspec_jax import SamplingParams
from easyspec_jax.server.protocol import Asked, RequestError, read_request, seeded
from easyspec_jax.tokenizer.conversation import Conversation

USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f", "strict": False}}


def read(chat: bool = True, **fields: Any) -> Asked:
    base = {"messages": [USER]} if chat else {"prompt": "a"}
    return read_request(json.dumps(base | fields).encode(), chat)


def refused(body: bytes, chat: bool = True) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_request(body, chat)
    return caught.value


def test_a_chat_request():
    asked = read(
        model="m",
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        seed=7,
        max_completion_tokens=9,
        stop="end",
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        easyspec={"trace": True, "plain": False},
        user="u",
        tools=[TOOL],
        parallel_tool_calls=False,
    )
    assert asked == Asked(
        chat=True,
        model="m",
        prompts=[Conversation([USER], (TOOL,))],
        sampling=SamplingParams(0.5, 5, 0.9, 7, 9, ("end",)),
        limited=True,
        n=2,
        stream=True,
        include_usage=True,
        trace=True,
        tools=True,
        parallel_tool_calls=False,
    )


def test_tools_can_be_kept_from_the_model():
    asked = read(tools=[TOOL], tool_choice="none")
    assert asked.prompts == [Conversation([USER])]
    assert not asked.tools
    assert read(tools=[TOOL], tool_choice="auto") == replace(read(tools=[TOOL]), sampling=ANY)


def test_defaults_are_openais():
    asked = read(chat=False)
    assert asked.sampling.temperature == 1.0
    assert asked.sampling.max_new_tokens == 16
    assert not asked.limited
    # Without a seed every request draws its own.
    assert read().sampling.seed != read().sampling.seed


PERSON = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "person", "strict": True, "schema": PERSON},
                }
            },
            "json_schema",
            json.dumps(PERSON),
        ),
        ({"structured_outputs": {"json": PERSON}}, "json_schema", json.dumps(PERSON)),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "a+"),
        ({"guided_json": json.dumps(PERSON)}, "json_schema", json.dumps(PERSON)),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", '["a", "b"]'),
        ({"guided_json": PERSON, "response_format": {"type": "text"}}, "json_schema", None),
    ],
    ids=str,
)
def test_grammars_have_openais_and_vllms_names(fields, kind, text):
    grammar = read(messages=[USER], **fields).sampling.grammar
    assert (grammar and grammar.kind) == kind
    if grammar is not None and text is not None:
        assert grammar.text == text


def test_values_that_openai_and_vllm_take():
    fields = {"seed": -1, "top_k": -1, "n": 2, "best_of": 2, "modalities": ["text"]}
    found = read_request(json.dumps({"messages": [USER]} | fields).encode(), chat=True)
    assert (found.sampling.seed, found.sampling.top_k, found.n) == (2**32 - 1, 0, 2)


def test_answers_have_seeds_of_their_own():
    asked = read(seed=2**32 - 1)
    assert [seeded(asked, number).seed for number in range(2)] == [2**32 - 1, 0]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], "a"], [[1], "a"])],
)
def test_prompts_are_texts_or_ids(prompt, prompts):
    assert read(chat=False, prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "list of objects"),
        ({"messages": [{"role": "user"}]}, None, "needs a role and a content"),
        ({"temperature": -1}, "temperature", "0 (greedy)"),
        ({"temperature": "hot"}, "temperature", "of the wrong type"),
        ({"top_p": 0}, "top_p", "a probability"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens 0 must be at least 1"),
        ({"max_completion_tokens": True}, None, "of the wrong type"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 65}, "n", "at most 64 answers"),
        ({"n": True}, "n", "of the wrong type"),
        ({"stream": 1}, "stream", "of the wrong type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream"),
        ({"stop": ["x"] * 17}, "stop", "16 strings"),
        ({"stop": ""}, "stop", "would end every text"),
        ({"easyspec": {"trace": 1}}, None, "trace"),
        ({"logit_processors": [1]}, "logit_processors", "not supported"),
        ({"add_special_tokens": True}, "add_special_tokens", "true is not supported"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids", "not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "not supported"),
        ({"stop_token_ids": [[1]]}, "stop_token_ids", "whole number"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "an object of ids and numbers"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"verbosity": "low"}, "verbosity", "not supported"),
        ({"documents": [{"text": "a"}]}, "documents", "not supported"),
        ({"return_token_ids": True}, "return_token_ids", "not supported"),
        ({"do_sample": False}, "do_sample", "not supported"),
        ({"easyspec": {"plian": True}}, "easyspec", "has no field 'plian'"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options",
            "has no field 'continuous_usage_stats'",
        ),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"structural_tag": "{}"}, "structural_tag", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object, or json_schema"),
        ({"response_format": "json"}, "response_format", "of the wrong type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": None}}},
            "response_format",
            "json_schema that has the schema",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least one text"),
        ({"structured_outputs": {"json": [1]}}, None, "of the wrong type"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs", "must be an object"),
        ({"guided_choice": ["", "a"]}, "guided_choice", "at least one character"),
        ({"guided_grammar": "start: A"}, "guided_grammar", "not supported"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "exclude each other"),
        ({"tools": {}}, "tools", "of the wrong type"),
        ({"tools": [TOOL | {"type": "web_search"}]}, "tools", "'web_search' are not supported"),
        ({"tool_choice": "any"}, "tool_choice", "use 'auto', 'none', 'required' or"),
        ({"tool_choice": "required"}, "tool_choice", "'required' needs a function of tools"),
        ({"tools": [TOOL, TOOL], "tool_choice": "required"}, "tools", "two functions of one name"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}],
                "tool_choice": "required",
            },
            "tools",
            "must be a schema of an object",
        ),
        (
            {"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"},
            "guided_regex",
            "guided_regex and tools exclude each other",
        ),
        ({"temperture": 1}, "temperture", "did you mean 'temperature'"),
        ({"prompt": "a"}, "messages", "messages is needed"),
    ],
)
def test_bad_fields_are_named(fields, param, message):
    error = refused(json.dumps({"messages": [USER]} | fields).encode())
    assert error.status == 400
    assert message in error.message
    assert error.as_dict()["error"]["param"] == param
    assert error.as_dict()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [5, [], [[]], [-1], [True], [None], {"a": 1}, ["a", 1]])
def test_bad_prompts(prompt):
    error = refused(json.dumps({"prompt": prompt}).encode(), chat=False)
    assert "prompt must be a string, token ids, or a list of either" in error.message


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b"\xff", b"nul", b'{"messages": NaN}', b"[" * 100000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_object(body):
    assert refused(body).status == 400
    assert "the body" in refused(body).message


def test_a_completion_needs_a_prompt():
    assert "prompt is needed" in refused(b"{}", chat=False).message


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "model", "messages", "prompt", "temperature", "top_p", "top_k", "seed", "max_tokens",
        "max_new_tokens", "stop", "n", "stream", "stream_options", "easyspec", "tools",
        "tool_choice", "logprobs", "top_logprobs", "response_format", "logit_bias", "user", "x",
    ]
)  # fmt: skip


@given(st.dictionaries(FIELDS, JSON, max_size=6), st.booleans())
@settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_fields_are_read_or_refused(fields, chat):
    base = {"messages": [USER]} if chat else {"prompt": "a"}
    try:
        read_request(json.dumps(base | fields).encode(), chat)
    except RequestError as error:
        assert error.status == 400
        assert "\n" not in error.message
