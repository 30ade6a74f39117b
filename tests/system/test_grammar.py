"""Whole generations with a grammar: the text of plain decoding, and always one that is allowed."""

import json
import re
from dataclasses import replace
from functools import cache

import pytest

pytest.importorskip("llguidance")

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.decode.tiers import TierChoice
from easyspec_jax.errors import EasySpecError
from easyspec_jax.sampling.adjustments import Kinds
from easyspec_jax.sampling.grammar import MOST_FORCED
from tests.support.models import save_noisy_pair

VOCAB, EOS = 260, 2
PROMPTS = ["the cat sat", "b"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 2},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
JSON = SamplingParams(json_schema=SCHEMA, max_new_tokens=120)
NUMBER = SamplingParams(regex=r"[1-9][0-9]{2,9}(\.[0-9]+)?", max_new_tokens=10)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Return a function that opens a target, and a draft that often agrees with it."""
    directory = tmp_path_factory.mktemp("models")
    save_noisy_pair(
        directory / "target", directory / "draft", "llama3", vocab_size=VOCAB, eos_token_id=EOS
    )

    @cache
    def open_pair(mesh="1", prefix_cache=0, itself=False, **speculative):
        config = SpeculativeConfig(**speculative)
        draft = directory / ("target" if itself else "draft") if config.needs_draft else None
        own = {"speculative": config, "mesh": mesh, "prefix_cache": prefix_cache}
        return open_model(directory / "target", draft, **own)

    return open_pair


def texts(engine, sampling, batch_size=1):
    return [found.token_ids for found in engine.generate(PROMPTS, sampling, batch_size=batch_size)]


WAYS = {
    "chain": {"method": "sd"},
    "tree": {"method": "tree", "tree_nodes": 9},
    "groups on 2 devices": {"lp_size": 2, "tree_width": 3, "mesh": "2"},
    "groups on 8 devices": {"lp_size": 4, "mesh": "8", "draft_tensor_parallel_size": "1"},
    "lookups": {"method": "ngram"},
    "lookups in a tree": {"lp_size": 3, "prompt_lookup": True, "tree_width": 2},
}
EVERY_RUN = ("groups on 8 devices", "lookups in a tree")


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [way if way in EVERY_RUN else pytest.param(way, marks=pytest.mark.exhaustive) for way in WAYS],
)
def test_texts_are_those_of_plain_decoding(opened, way):
    engine = opened(verifier="coupled", **WAYS[way])
    plain = opened(method="vanilla", verifier="coupled")
    accepted = 0
    for sampling in (replace(JSON, temperature=0.0), replace(JSON, temperature=0.9, seed=3)):
        wanted = texts(plain, sampling)
        found = list(engine.generate(PROMPTS, sampling, batch_size=2))
        assert [one.token_ids for one in found] == wanted
        for one in found:
            assert one.finish_reason == "stop"
            value = json.loads(one.text)
            assert list(value) == ["name", "tags"]
            assert len(value["name"]) <= 6
            assert set(value["tags"]) <= {"x", "yy"}
            accepted += one.stats.accepted
    assert accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tree_width": 2}, {"prompt_lookup": True}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rounds_of_every_tier_keep_to_the_grammar(opened, temperature, options, monkeypatch):
    taken = []

    def in_turn(choice: TierChoice, unread: int) -> int:
        choice._now = choice.tiers[len(taken) % len(choice.tiers)]
        taken.append(choice._now)
        return choice._now

    sampling = replace(JSON, temperature=temperature)
    wanted = texts(opened(method="vanilla", verifier="coupled"), sampling)
    monkeypatch.setattr(TierChoice, "next", in_turn)
    engine = opened(lp_size=2, adapt=True, **options)
    assert texts(engine, sampling, batch_size=2) == wanted
    assert set(taken) == {0, 2, 5}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_grammar_begins_behind_a_kept_prefix(opened, temperature):
    """Its output is what follows the prompt, whatever the caches held of it before."""
    sampling = replace(JSON, temperature=temperature)
    prompt = PROMPTS[0] * 4
    engine = opened(lp_size=2, verifier="coupled", prefix_cache=1 << 24)
    fresh = opened(method="vanilla", verifier="coupled")
    (first,) = engine.generate([prompt], sampling)
    for again in (prompt, prompt + first.text + "and"):
        (found,) = engine.generate([again], sampling)
        assert found.stats.cached_tokens > len(prompt) // 2
        (wanted,) = fresh.generate([again], sampling)
        assert found.token_ids == wanted.token_ids
        assert list(json.loads(found.text)) == ["name", "tags"]


def test_what_is_forced_costs_no_draft(opened):
    """A text without a choice takes as many tokens as are forced, drafted, and one more."""
    (found,) = opened(method="sd").generate(PROMPTS[:1], SamplingParams(choice=("only this text",)))
    assert found.text == "only this text"
    assert found.finish_reason == "stop"
    # Of 15 tokens, with the end, the first is the prefill's, and one comes after the first draft.
    assert found.tokens_per_round == [MOST_FORCED + 5 + 1, MOST_FORCED + 4]
    assert found.stats.forced == 2 * MOST_FORCED
    assert found.stats.accepted == found.stats.drafted == 9
    assert found.stats.mean_acceptance_length == 1 + (2 * MOST_FORCED + 9) / 2


@pytest.mark.parametrize("way", [{"method": "sd"}, {"lp_size": 1}], ids=str)
def test_a_draft_of_the_target_itself_goes_on_behind_what_is_forced(opened, way):
    """Exact, it is accepted whole, unless it lacks keys or values of forced tokens."""
    engine = opened(itself=True, **way)
    (found,) = engine.generate(PROMPTS[:1], JSON)
    assert json.loads(found.text)
    assert found.stats.forced > 3
    assert found.stats.accepted == found.stats.drafted > 0
    (wanted,) = opened(method="vanilla").generate(PROMPTS[:1], JSON)
    assert found.token_ids == wanted.token_ids
    assert wanted.stats.forced == 0


def test_a_draft_keeps_what_it_wrote_behind_forced_tokens(opened):
    """Without calibration, an exact draft that lacked some of it would not be accepted whole."""
    sampling = SamplingParams(regex="(ab[0-9]{5}x){6}", max_new_tokens=48)
    (found,) = opened(itself=True, method="sd").generate(PROMPTS[:1], sampling)
    assert found.stats.forced >= 10
    assert found.stats.accepted == found.stats.drafted >= 25


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_with_and_without_a_grammar(opened, temperature):
    """Each row is what it is alone, and a row without a grammar is free."""
    engine = opened(method="sd")
    free = SamplingParams(temperature, max_new_tokens=12)
    wanted = [
        replace(NUMBER, temperature=temperature),
        free,
        replace(free, choice=("cat", "dog", "dogs")),
        replace(free, seed=5, logit_bias={120: 5.0}),
    ]
    kinds = Kinds()
    for sampling in wanted:
        kinds |= Kinds.of(sampling)
    rows = (engine.row(PROMPTS[0], sampling, kinds=kinds) for sampling in wanted)
    found = dict(engine.complete_each(rows, 2))
    for number, sampling in enumerate(wanted):
        (alone,) = engine.generate(PROMPTS[:1], sampling)
        assert found[number].token_ids == alone.token_ids
    assert re.match(r"[1-9][0-9]{2,9}(\.[0-9]*)?$", found[0].text)
    assert found[2].text in ("cat", "dog", "dogs")


@pytest.mark.slow
def test_passes_of_a_fixed_number_of_rows(opened):
    """--bit-stable fills up a chain with tokens that no grammar has seen."""
    stable = opened(method="sd", bit_stable=True)
    assert texts(stable, JSON) == texts(opened(method="vanilla", bit_stable=True), JSON)


def test_options_that_leave_no_token_end_the_text_in_an_error(opened):
    """At the end of the grammar only a stop token is allowed, and it may not come yet."""
    engine = opened(method="sd")
    sampling = SamplingParams(choice=("abc",), min_new_tokens=8, max_new_tokens=12)
    (found,) = engine.generate(PROMPTS[:1], sampling)
    assert (found.text, found.finish_reason) == ("abc", "error")
    assert "no token may follow here by `choice` and the other options" in found.error


def test_other_options_keep_to_the_grammar(opened):
    engine = opened(method="sd")
    (six,) = (engine.encode(letter)[-1] for letter in "6")
    sampling = replace(
        NUMBER,
        temperature=1.0,
        top_k=4,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        logit_bias={six: 6.0},
        bad_words_ids=((six, six),),
        logprobs=2,
    )
    (found,) = engine.generate(PROMPTS[:1], sampling)
    assert re.match(r"[1-9][0-9]{2,9}(\.[0-9]*)?$", found.text)
    assert "66" not in found.text
    # They are of the target's own distribution, which knows no grammar.
    assert len(found.logprobs) == len(found.token_ids)


def test_what_cannot_be_used_is_one_line(opened):
    engine = opened(method="sd")
    endless = SamplingParams(regex="a+", ignore_eos=True)
    with pytest.raises(EasySpecError, match="`regex` needs a token that ends the text"):
        list(engine.generate(PROMPTS, endless))
    with pytest.raises(EasySpecError, match="`json_schema` cannot be used: Invalid type: strin"):
        engine.compile(PROMPTS, SamplingParams(json_schema={"type": "strin"}))


def lowered(engine, sampling):
    """Return the text of the compiled round, and whether it calls the host."""
    programs = engine.programs(sampling)
    state = programs.start(sampling, [8], 128, [[3, 4]])
    text = programs.compiled.round.lower(programs.leaves, state).as_text()  # pyright: ignore[reportFunctionMemberAccess]
    return text, "callback" in text


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.8, min_p=0.1)], ids=str)
def test_without_a_grammar_programs_are_what_they_were(opened, sampling):
    engine = opened(method="sd")
    before, calls = lowered(engine, sampling)
    assert not calls
    number = SamplingParams(regex="[0-9]+", max_new_tokens=4)
    assert lowered(engine, number)[1]
    engine._programs.clear()
    assert lowered(engine, sampling) == (before, False)
