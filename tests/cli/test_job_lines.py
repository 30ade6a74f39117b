"""Lines of a job: fields of ours and of OpenAI's, and what is wrong with other lines."""

import json
from typing import Any

import pytest

from easyspec_jax import SamplingParams
from easyspec_jax.cli.job_lines import Item, read_items
from easyspec_jax.tokenizer.conversation import Conversation

PLAIN = SamplingParams(max_new_tokens=10)
USER = {"role": "user", "content": "hello"}


def item(**fields: Any) -> Item:
    (read,) = read_items(json.dumps({"id": "a"} | fields).encode(), PLAIN)
    return read


@pytest.mark.parametrize(
    "line, message",
    [
        ("[]", "no JSON object"),
        ("[" * 100000, "no JSON"),
        ('{"id": 1}', "either"),
        ('{"id": true, "prompt": "a"}', "id must"),
        ('{"id": 1, "prompt": 5}', "must be a string"),
        ('{"id": 1, "promt": "a"}', "'promt' is unknown"),
        ('{"id": 1, "messages": []}', "list of objects"),
        ('{"id": 1, "prompt": "a", "top_k": 1.5}', "wrong type"),
        ('{"id": 1, "prompt": "a", "seed": -1}', "seed"),
        ('{"id": 1, "prompt": "a", "temperature": 1' + "0" * 400 + "}", "ordinary size"),
        ('{"id": 1, "prompt": "a", "stop": [1]}', "stop must"),
    ],
)
def test_bad_lines(line, message):
    (item,) = read_items(line.encode(), PLAIN)
    assert item.error is not None
    assert message in item.error


def test_seeds_follow_line_numbers():
    content = (
        b'{"id": 1, "prompt": "a"}\n\n{"id": 2, "prompt": "b"}\n{"id": 3, "prompt": "c", "seed": 9}'
    )
    assert [
        item.sampling and item.sampling.seed
        for item in read_items(content, SamplingParams(seed=2**32 - 1))
    ] == [2**32 - 1, 1, 9]


def test_fields_of_openais_batches_are_understood():
    body = {
        "model": "any",
        "messages": [USER],
        "max_tokens": 7,
        "temperature": 0.5,
        "stop": None,
        "metadata": {"a": 1},
        "n": 1,
        "presence_penalty": 0,
        "logit_bias": {},
        "stream": False,
        "user": "u",
        "tools": [{"type": "function"}],
    }
    line = {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (read,) = read_items(json.dumps(line).encode(), PLAIN)
    assert read.error is None
    assert (read.id, read.prompt) == ("request-1", Conversation([USER], ({"type": "function"},)))
    assert read.sampling == SamplingParams(temperature=0.5, max_new_tokens=7)
    assert not read.unused


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "stop": None, "temperature": None, "seed": None, "messages": None},
        {
            "prompt": "a",
            "max_tokens": 10,
            "max_new_tokens": 10,
            "metadata": {"x": [1]},
            "user": None,
        },
        {
            "prompt": "a",
            "n": 1,
            "frequency_penalty": 0.0,
            "logprobs": False,
            "tool_choice": "auto",
            "top_logprobs": None,
        },
    ],
)
def test_what_is_null_or_asks_for_nothing_changes_nothing(fields):
    assert item(**fields) == Item(1, "a", "a", PLAIN)


def test_sampling_options_of_a_line():
    read = item(
        prompt="a",
        temperature=1,
        min_p=0.1,
        logit_bias={"50": -100, "7": 1.5},
        min_tokens=3,
        ignore_eos=True,
        stop_token_ids=[7, 9],
        presence_penalty=1,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        bad_words=["no", "never"],
        n=2,
        logprobs=True,
        top_logprobs=4,
        prompt_logprobs=0,
    )
    assert read.sampling == SamplingParams(
        1.0,
        max_new_tokens=10,
        min_p=0.1,
        logit_bias={7: 1.5, 50: -100.0},
        min_new_tokens=3,
        ignore_eos=True,
        stop_token_ids=(7, 9),
        presence_penalty=1.0,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        bad_words=("no", "never"),
        n=2,
        logprobs=4,
        prompt_logprobs=0,
    )
    assert not read.unused


def test_a_grammar_of_a_line_replaces_the_default():
    default = SamplingParams(json_schema={"type": "object"})
    (read,) = read_items(b'{"id": "a", "prompt": "a", "regex": "a+"}', default)
    assert read.sampling == SamplingParams(regex="a+")


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": 5}, 5),
        ({"logprobs": 0}, 0),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ],
)
def test_logprobs_are_asked_for_as_in_chats_and_in_completions(fields, logprobs):
    read = item(prompt="a", **fields)
    assert read.sampling == SamplingParams(max_new_tokens=10, logprobs=logprobs)


def test_fields_that_only_describe_a_line_are_not_used():
    assert item(prompt="a", category="code", reference_answer=None, level=3).unused == (
        "category",
        "level",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt": "a", "temprature": 0.5},
            "'temprature' is unknown; did you mean 'temperature'?",
        ),
        (
            {"prompt": "a", "max_tokens": 5, "max_new_tokens": 6},
            "max_new_tokens is given twice, as '5' and '6'",
        ),
        ({"prompt": "a", "n": 2}, "`n` 2 texts would be equal at `temperature` 0"),
        ({"prompt": "a", "best_of": 2}, "best_of '2' is not supported"),
        ({"prompt": "a", "stop_token_ids": ["x"]}, "`stop_token_ids` 'x' must be a whole number"),
        ({"prompt": "a", "stop_token_ids": [True]}, "stop_token_ids must be a list of whole"),
        ({"prompt": "a"} | {f"x{i}": 1 for i in range(65)}, "more than 64 unknown fields"),
        (
            {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
            "is not supported",
        ),
        ({"messages": [USER], "system": "be brief"}, "system 'be brief' is not supported"),
        ({"prompt": "a", "presence_penalty": 3}, "`presence_penalty` 3.0 must be from -2 to 2"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must be an object of ids"),
        ({"prompt": "a", "logit_bias": {"5": True}}, "logit_bias must be an object of ids"),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos '1' is of the wrong type"),
        ({"prompt": "a", "prompt_logprobs": True}, "prompt_logprobs 'True' is of the wrong type"),
        ({"prompt": "a", "top_logprobs": 2}, "top_logprobs needs logprobs true"),
        (
            {"prompt": "a", "logprobs": True, "top_logprobs": "x"},
            "top_logprobs 'x' is of the wrong",
        ),
        ({"prompt": "a", "bad_words": [1]}, "bad_words must be a list of strings"),
        ({"prompt": "a", "suffix": "b"}, "is not supported"),
        ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format must have the type"),
        ({"prompt": "a", "structured_outputs": {"grammar": "x"}}, "structured_outputs must have"),
        ({"prompt": "a", "regex": "a", "structured_outputs": {"regex": "b"}}, "contradicts"),
        ({"prompt": "a", "regex": "a", "choice": ["b"]}, "exclude each other"),
        ({"prompt": "a", "json_schema": "[1]"}, "json_schema` [1] must be an object"),
        ({"prompt": "a", "json_schema": "{"}, "json_schema` is not JSON: Expecting property"),
        ({"prompt": "a", "choice": []}, "choice` must have at least one text"),
        ({"prompt": "a", "choice": ["b", ""]}, "choice` takes several texts, each of at least"),
        ({"prompt": "a", "choice": ["b", 1]}, "choice must be a list of strings"),
        ({"prompt": "a", "regex": "\ud800"}, "is not valid Unicode"),
        ({"prompt": "a", "tools": [{}]}, "tools go with messages"),
        ({"prompt": ["a", "b"]}, "prompt must be a string"),
        ({"messages": {"role": "user"}}, "messages must be a list of objects"),
        ({"messages": [USER], "tools": [1]}, "tools must be a list of objects"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, "content parts must be text"),
        ({"body": "x"}, "body must be an object"),
        ({"body": {"prompt": "b"}, "prompt": "a"}, "prompt is given twice"),
        ({"prompt": "a", "custom_id": "b"}, "id is given twice"),
    ],
)
def test_an_error_keeps_the_id_of_its_line(fields, message):
    read = item(**fields)
    assert read.error is not None
    assert message in read.error
    assert read.id == "a"


@pytest.mark.parametrize("own", [None, True, 1.5, [1, "x"], {"a": None}, "", -3, 10**50])
def test_an_id_of_any_type_is_given_back(own):
    (read,) = read_items(json.dumps({"id": own, "prompt": 5}).encode(), PLAIN)
    assert read.error is not None
    assert read.id == own


@pytest.mark.parametrize(
    "line", ['{"id": NaN, "prompt": 5}', '{"id": 1e999, "prompt": 5}', "[[", "\xff", "{" * 9999]
)
def test_what_cannot_be_given_back_is_null(line):
    (read,) = read_items(line.encode("latin-1"), PLAIN)
    assert read.error is not None
    assert read.id is None


def test_a_second_line_of_an_id_is_told_with_that_id():
    lines = [
        {"id": 1, "prompt": 7},
        {"id": 1, "prompt": "a"},
        {"id": 1, "prompt": "b"},
        {"id": "1", "prompt": "c"},
    ]
    read = read_items("\n".join(map(json.dumps, lines)).encode(), PLAIN)
    assert [item.id for item in read] == [1, 1, 1, "1"]
    assert [item.error and item.error[:9] for item in read] == [
        "prompt mu",
        None,
        "id 1 is t",
        None,
    ]


def test_a_system_message_is_for_every_line_without_one():
    lines = [
        {"id": 1, "prompt": "hello"},
        {"id": 2, "messages": [{"role": "system", "content": "own"}, USER]},
    ]
    first, second = read_items("\n".join(map(json.dumps, lines)).encode(), PLAIN, system="be brief")
    assert first.prompt == Conversation([{"role": "system", "content": "be brief"}, USER])
    assert second.prompt == Conversation([{"role": "system", "content": "own"}, USER])
