"""What an engine is asked for and cannot do is refused before it does anything."""

from dataclasses import replace

import pytest

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.arithmetic import power_of_two
from easyspec_jax.engine.needs import needed
from easyspec_jax.engine.serving import OPTIONS
from easyspec_jax.sampling.adjustments import Kinds
from easyspec_jax.tokenizer import encode
from tests.support.models import save_model

PLAIN = SpeculativeConfig(method="vanilla")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3", vocab_size=260, eos_token_id=3)
    return directory


@pytest.fixture(scope="module")
def engine(directory):
    return open_model(directory, speculative=PLAIN)


def test_a_store_of_prefixes_has_a_size(directory):
    with pytest.raises(EasySpecError, match="`prefix_cache` -1 must be at least 0"):
        open_model(directory, speculative=PLAIN, prefix_cache=-1)


def test_bit_stable_texts_reuse_nothing(directory):
    """What is kept was written by passes of other sizes, which may round otherwise."""
    stable = SpeculativeConfig(method="vanilla", bit_stable=True)
    with pytest.raises(EasySpecError, match="`bit_stable` needs `prefix_cache` 0"):
        open_model(directory, speculative=stable, prefix_cache=1 << 20)
    with pytest.raises(EasySpecError, match="`bit_stable` needs `prefix_cache` 0"):
        open_model(directory, speculative=PLAIN, prefix_cache=1 << 20).variant(stable)


def test_bad_words_longer_than_a_text_take_no_room(engine):
    """All texts of a job would have arrays of that length."""
    sampling = SamplingParams(max_new_tokens=4, bad_words_ids=((1, 2, 3, 4), (1,) * 5000))
    assert engine.with_ids(sampling).bad_words_ids == ((1, 2, 3, 4),)
    assert engine.config(sampling).kinds.bad_word_length == 4


def test_speculation_needs_a_draft(directory, engine):
    with pytest.raises(EasySpecError, match="`method` tree needs `draft` DIR"):
        open_model(directory, speculative=SpeculativeConfig(method="tree"))
    with pytest.raises(EasySpecError, match="`method` easyspec needs `draft` DIR"):
        engine.variant(SpeculativeConfig())


@pytest.mark.parametrize(
    ("prompts", "options", "complaint"),
    [
        ("one", {}, "give a list of prompts, not one string"),
        ([{"role": "user", "content": "one"}], {}, "put one conversation into a list"),
        (
            ["one", "two"],
            {"batch_size": 2, "on_text": print},
            "texts of one batch cannot be streamed at once",
        ),
    ],
)
def test_prompts_that_are_none(engine, prompts, options, complaint):
    with pytest.raises(EasySpecError, match=complaint):
        engine.generate(prompts, **options)


def test_a_prompt_is_tokenised_once(engine, monkeypatch):
    calls = []

    def counted(tokenizer, prompt, chat):
        calls.append(prompt)
        return encode(tokenizer, prompt, chat)

    monkeypatch.setattr("easyspec_jax.engine.engine.encode", counted)
    sampling = SamplingParams(max_new_tokens=2)
    rows = engine.prepare(["one", "two"])
    engine.compile(rows, sampling)
    again = engine.baseline()
    again.compile(rows, sampling)
    texts = [
        [completion.token_ids for completion in own.generate(rows, sampling)]
        for own in (engine, again)
    ]
    assert calls == ["one", "two"]
    assert texts[0] == texts[1]
    assert [row.prompt for row in rows] == ["one", "two"]


def test_no_more_tokens_are_asked_for_than_a_text_has(engine):
    """Otherwise 2³¹ tokens would overflow int32 and give a grammar as many columns."""
    few = SamplingParams(max_new_tokens=5, min_new_tokens=2)
    many = SamplingParams(max_new_tokens=2**31, min_new_tokens=2**31 - 1, regex="a+")
    least, most = map(engine.with_ids, (few, many))
    assert (least.max_new_tokens, least.min_new_tokens) == (5, 2)
    assert most.max_new_tokens == most.min_new_tokens == engine.max_length
    assert engine.config(most).kinds.grammar == power_of_two(engine.max_length)


def test_options_of_neighbours_take_memory_too(engine):
    plain, more = (
        engine.workload(64, 32, 4, SamplingParams(), kinds) for kinds in (Kinds(), OPTIONS)
    )
    assert needed(more).total > needed(plain).total


def test_rows_of_an_engine_with_more_room_are_refused(directory, engine):
    rows = engine.prepare(["a prompt of some length"])
    small = open_model(directory, speculative=PLAIN, max_length=5)
    with pytest.raises(EasySpecError, match="no room within `max_length` 5"):
        small.generate(rows)


def test_a_batch_has_rows(engine):
    with pytest.raises(EasySpecError, match="`batch_size` 0 must be at least 1"):
        next(engine.complete_each([engine.row("one", SamplingParams())], 0))


def test_a_token_that_the_target_does_not_know(tmp_path):
    save_model(tmp_path, "llama3", vocab_size=80, eos_token_id=3)
    engine = open_model(tmp_path, speculative=PLAIN)
    with pytest.raises(
        EasySpecError, match=r"the tokenizer gives id \d+, for which the target has no embedding"
    ):
        engine.encode("one")


@pytest.mark.parametrize(
    ("dtype", "options", "adapts"),
    [
        ("float32", {}, True),
        ("bfloat16", {}, False),
        ("float32", {"kv_dtype": "int8"}, False),
        ("float32", {"kv_dtype": "int8", "bit_stable": True}, True),
        ("bfloat16", {"bit_stable": True}, True),
        ("bfloat16", {"adapt": True}, True),
        ("float32", {"adapt": False}, False),
    ],
    ids=str,
)
def test_rounds_adapt_by_themselves_where_passes_of_all_sizes_round_alike(
    directory, dtype, options, adapts
):
    options = {"method": "ngram", "adapt": "auto"} | options
    caches = {"kv_dtype": options.pop("kv_dtype", "auto")}
    speculative = SpeculativeConfig(**options)
    engine = open_model(directory, speculative=speculative, dtype=dtype, **caches)
    assert bool(engine.config(SamplingParams()).tiers) == adapts
    other = engine.variant(replace(speculative, num_speculative_tokens=1))
    assert bool(other.config(SamplingParams()).tiers) == adapts
