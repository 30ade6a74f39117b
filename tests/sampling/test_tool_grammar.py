"""Which texts a grammar of tool calls allows, with and without tokens for its tags."""

import pytest

pytest.importorskip("llguidance")

from easyspec_jax import demo
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Grammar, SamplingParams
from easyspec_jax.sampling.grammar_compiler import compiled, open_vocabulary
from easyspec_jax.sampling.tool_grammar import ToolGrammar
from easyspec_jax.tokenizer.loading import load_tokenizer
from easyspec_jax.tokenizer.tool_calls import BEGIN, END, ToolCall, ToolCallParser

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string"}},
}
ARGUMENTS = {"weather": CITY, 'say "é"': {"type": "object"}}


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


WEATHER, SAY = call("weather", '{"city": "Rome"}'), call(r"say \"é\"", '{"loud": [1]}')
TEXTS = {
    "one": WEATHER,
    "two": f"{WEATHER}\n{SAY}",
    "said": f"I look it up.\n{WEATHER}",
    "said after": f"{WEATHER} and so on",
    "none": "A < b, a <tool_call: nothing is called",
    "other arguments": call("weather", '{"town": 1}'),
    "no object": call(r"say \"é\"", "[1]"),
    "other name": call("walk", "{}"),
    "cut off": WEATHER[:-4],
}


@pytest.fixture(scope="module", params=[False, True], ids=["bytes", "tokens"])
def vocabulary(request):
    """The bundled vocabulary, with the tags as tokens that are not special, or without."""
    tokenizer = load_tokenizer(demo.TARGET)
    if request.param:
        tokenizer.add_tokens([BEGIN, END])
    ids = 1 + max(tokenizer.get_vocab().values())
    vocabulary = open_vocabulary(tokenizer, ids, (tokenizer.eos_token_id,), "tool_calls")

    def allows(grammar, text):
        matcher = compiled(Grammar("tool_calls", grammar.text), vocabulary).deep_copy()
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return allows


@pytest.mark.parametrize(
    ("needs_call", "several", "allowed"),
    [
        (True, True, {"one", "two"}),
        (True, False, {"one"}),
        (False, True, {"one", "two", "said", "said after", "none"}),
        (False, False, {"one", "said", "said after", "none"}),
    ],
)
def test_which_texts_are_allowed(vocabulary, needs_call, several, allowed):
    grammar = ToolGrammar(ARGUMENTS, needs_call, several)
    assert {name for name, text in TEXTS.items() if vocabulary(grammar, text)} == allowed


def test_what_is_allowed_is_parsed_as_calls():
    parser = ToolCallParser()
    found = parser.feed(TEXTS["two"]) + parser.end()
    assert found == [
        ToolCall("weather", '{"city": "Rome"}'),
        ToolCall('say "é"', '{"loud": [1]}'),
    ]


@pytest.mark.parametrize("needs_call", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_a_grammar_is_what_its_text_says(needs_call, several):
    grammar = ToolGrammar(ARGUMENTS, needs_call, several)
    assert ToolGrammar.read(grammar.text) == grammar
    assert SamplingParams(tool_calls=grammar.text).grammar == Grammar("tool_calls", grammar.text)


def test_a_schema_that_llguidance_does_not_know_is_refused(vocabulary):
    grammar = ToolGrammar({"f": {"type": "object", "not": {}}}, needs_call=True, several=True)
    with pytest.raises(EasySpecError, match=r"`tool_calls` cannot be used: .*Unimplemented"):
        vocabulary(grammar, "")
