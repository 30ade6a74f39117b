"""Finders find what decoding finds, and simulated rounds are those of decoding."""

import json

import jax
import numpy as np
import pytest

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.decode.lookup import Lookup, find
from experiments.ours.lookup import (
    FINDERS,
    Ngrams,
    Simulated,
    SuffixAutomaton,
    main,
    periodic,
    simulate,
)
from tests.support.models import save_model


def texts(seed: int, length: int = 60) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, size, length).tolist() for size in (1, 2, 3, 8, 30)]


def test_an_automaton_finds_what_n_grams_of_any_length_find():
    for shortest in (1, 3):
        for text in texts(shortest):
            automaton, ngrams = SuffixAutomaton(shortest), Ngrams(len(text), shortest)
            for token in text:
                automaton.push(token)
                ngrams.push(token)
                assert automaton.continuation(4) == ngrams.continuation(4)


def test_n_grams_are_those_that_decoding_looks_up():
    look_up = jax.jit(find, static_argnums=(2, 3))
    for text in texts(1):
        ngrams, padded = Ngrams(4, 2), np.asarray([text], np.int32)
        for place, token in enumerate(text):
            ngrams.push(token)
            found = look_up(padded, np.full(1, place, np.int32), Lookup(4, 2), 5)
            expected = found.tokens[0].tolist() if found.matched[0] else []
            assert ngrams.continuation(5) == expected


def test_a_text_that_reaches_its_end_begins_again():
    assert periodic([5, 6, 7, 6], 2, 5) == [7, 6, 7, 6, 7]


def test_simulated_rounds_by_hand():
    # After 1 2 3 | 1: nothing of two tokens matches. Then "1 2" does, and drafts 3 1 2, of which
    # the limit leaves two; then the text is complete.
    assert simulate(Ngrams(3, 2), [1, 2, 3], [1, 2, 3, 1, 9], levels=3) == Simulated(2, 1, 2)


@pytest.mark.slow
def test_simulated_rounds_are_those_of_decoding(tmp_path):
    """And every way of the experiment gives the same text."""
    save_model(tmp_path / "model", "smollm2", num_hidden_layers=2)
    model = str(tmp_path / "model")
    lookup = SpeculativeConfig(method="ngram", prompt_lookup_max=4, prompt_lookup_min=2)
    (completion,) = open_model(model, speculative=lookup).generate(
        ["one two"], SamplingParams(max_new_tokens=60)
    )
    found = simulate(Ngrams(4, 2), completion.prompt_ids, completion.token_ids, 5)
    assert found.rounds == completion.stats.rounds
    # The last round may accept up to the limit, which leaves no room for a token of its own.
    assert completion.stats.accepted - found.accepted in (0, 1)

    question = {"question_id": 1, "category": "copies", "turns": ["one two one two"]}
    (tmp_path / "questions").write_text(json.dumps(question))
    out = tmp_path / "lookup.json"
    words = ["--target", model, "--draft", model, "--questions", str(tmp_path / "questions")]
    words += ["--max-new-tokens", "12", "--repeats", "1", "--out", str(out)]
    assert main(words) == 0
    rows = json.loads(out.read_text())["results"]
    ways = [row for row in rows if "way" in row]
    assert [row["way"] for row in ways] == ["plain", "ngram", "sd", "sd, prompt lookup"]
    assert all(row["same_tokens"] and row["kind"] == "copies" for row in ways)
    assert {row["finder"] for row in rows if "finder" in row} == set(FINDERS)
    (tmp_path / "questions").write_text(2 * (json.dumps(question) + "\n"))
    assert main(words) == 2
    assert main([*words, "--max-new-tokens", "1"]) == 2
    assert main([*words, "--repeats", "0"]) == 2
