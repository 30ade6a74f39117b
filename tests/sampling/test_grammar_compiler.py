"""Grammars and tokenizers that cannot be used are one line, within bounds of time and memory."""

import re
import sys
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

pytest.importorskip("llguidance")

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.sampling.grammar import Grammars
from tests.support.grammar import END, tokenizer_of

TOKENS = [*map(chr, range(33, 127)), END]
STOP = len(TOKENS) - 1


def check(vocab: int = 100, tokenizer: Any = None, **fields: Any) -> None:
    Grammars(tokenizer or tokenizer_of(TOKENS), vocab, (STOP,)).check(SamplingParams(**fields))


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


def schema_of(*patterns: str) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no regex": ({"regex": "("}, "`regex` cannot be used: unclosed group"),
    "look-around": ({"regex": "a(?=b)"}, "`regex` cannot be used: look-around"),
    "nested groups": (
        {"regex": "(" * 5000 + ")" * 5000},
        "`regex` cannot be used: exceed the maximum number of nested",
    ),
    "1 MB of regex": ({"regex": "a" * 1_000_000}, "`regex` is longer than 65536 bytes"),
    "1 MB of schema": (
        {"json_schema": {"description": "a" * 1_000_000}},
        "`json_schema` is longer than 65536 bytes",
    ),
    "1 MB of JSON": ({"json_schema": "[" * 1_000_000}, "`json_schema` is longer than 65536 bytes"),
    "1 MB of choices": ({"choice": ("a" * 500_000,) * 2}, "`choice` is longer than 65536 bytes"),
    "deep JSON": ({"json_schema": nested(5000)}, "`json_schema` is not JSON: maximum recursion"),
    "deep schema": ({"json_schema": nested(200)}, "`json_schema` cannot be used: recursion limit"),
    "unknown type": ({"json_schema": {"type": "strin"}}, "cannot be used: Invalid type: strin"),
    "unknown keyword": ({"json_schema": {"not": {}}}, "cannot be used: Unimplemented keys"),
    "another file": ({"json_schema": {"$ref": "file:///etc/hosts"}}, "does not fetch resources"),
    "another host": ({"json_schema": {"$ref": "http://localhost:9/a"}}, "does not fetch resources"),
    "endless": ({"json_schema": {"$ref": "#"}}, "`json_schema` cannot be used: it allows no text"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_one_line(case):
    fields, message = BAD[case]
    with pytest.raises(EasySpecError, match=re.escape(message)) as error:
        check(**fields)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


CATASTROPHIC = {
    "backtracking": {"regex": "(a+)+b"},
    "states": {"regex": "(a|b)*a(a|b){2000}"},
    "repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "length": {"json_schema": {"type": "string", "minLength": 10**6, "maxLength": 10**6}},
    "items": {"json_schema": {"type": "array", "minItems": 10**7, "items": {"type": "integer"}}},
}


def test_a_choice_may_hold_any_character():
    """llguidance takes no DEL within a string."""
    check(choice=("a\x7fb", '"', "\\", "\n"))


@pytest.mark.parametrize("case", CATASTROPHIC)
def test_what_other_engines_choke_on_compiles(case):
    check(**CATASTROPHIC[case])


SLOW = {
    "intersections": schema_of(*(f"(a|b)*{c}(a|b){{{n}}}" for n in range(3, 20) for c in "ab")),
    "multiples": {
        "prefixItems": [{"type": "integer", "multipleOf": 123457 + i} for i in range(99)]
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_what_would_take_minutes_is_given_up(case):
    with pytest.raises(EasySpecError, match="`json_schema` is too complex: it takes more than 5 s"):
        check(json_schema=SLOW[case])


def test_llguidance_is_asked_for_where_it_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "llguidance"]:
        monkeypatch.setitem(sys.modules, name, None)
    message = "`regex` needs llguidance; install it with pip install '.[grammar]'"
    with pytest.raises(EasySpecError, match=re.escape(message)):
        check(regex="a")


def test_the_target_must_have_the_tokenizers_ids():
    with pytest.raises(EasySpecError, match="`regex` needs a target that has all 95 ids of"):
        check(vocab=90, regex="a")


def test_tokenizers_without_bytes_cannot_be_used():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, END: STOP}, unk_token=END))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END)
    with pytest.raises(EasySpecError, match="`regex` cannot be used with this tokenizer: "):
        check(tokenizer=tokenizer, regex="a")


def test_something_must_end_the_text():
    with pytest.raises(EasySpecError, match="`regex` needs a token that ends the text"):
        check(regex="a", ignore_eos=True)
