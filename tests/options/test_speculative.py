"""Ways to speculate are checked where they are made, and named as their flags are."""

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "medusa", "`method` 'medusa' is not one of vanilla, sd, tree, easyspec, ngram"),
        ("verifier", "hopeful", "`verifier` 'hopeful' is not one of"),
        (
            "draft_tensor_parallel_size",
            "2",
            "`draft_tensor_parallel_size` '2' is not one of 1, all",
        ),
        ("num_speculative_tokens", 0, "`num_speculative_tokens` 0 must be"),
        ("num_speculative_tokens", 17, "`num_speculative_tokens` 17 must be"),
        ("lp_size", 0, "`lp_size` 0 must be at least 1"),
        ("tree_width", "4", "`tree_width` '4' must be a whole number"),
        ("confidence_threshold", "always", "`confidence_threshold` always must be a probability"),
        ("confidence_threshold", 1.5, "`confidence_threshold` 1.5 must be a probability from 0"),
        ("confidence_threshold", float("nan"), "`confidence_threshold` nan must be a probabil"),
        ("prompt_lookup_max", 0, "`prompt_lookup_max` 0 must be from 1 to 32"),
        ("prompt_lookup_min", 17, "`prompt_lookup_min` 17 must be from 1 to 16, `prompt_lookup_m"),
        ("tree_nodes", 4, "`tree_nodes` 4 must be from 5 to 5: one node a level to all"),
    ],
)
def test_speculative_config_names_the_flag(field, value, message):
    with pytest.raises(EasySpecError, match=message):
        SpeculativeConfig(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ngram", "tree_width": 2}, "`method` ngram grows no trees"),
        ({"method": "ngram"}, "which `method` ngram has not; `method` ngram looks up by itself"),
        ({"method": "vanilla"}, "which `method` vanilla has not"),
        ({"calibration": False}, "`prompt_lookup` needs calibration"),
        (
            {"method": "sd", "prompt_lookup": False, "prompt_lookup_corpus": "corpus.txt"},
            "`prompt_lookup_corpus` needs `prompt_lookup` or `method` ngram",
        ),
    ],
)
def test_lookups_that_cannot_be(options, message):
    with pytest.raises(EasySpecError, match=message):
        SpeculativeConfig(**({"prompt_lookup": "tree_width" not in options} | options))


@pytest.mark.parametrize("verifier", ["rejection", "block"])
def test_what_adapts_does_not_sample_by_rejection(verifier):
    with pytest.raises(EasySpecError, match=f"`adapt` cannot sample by {verifier}"):
        SpeculativeConfig(adapt=True, verifier=verifier)
    assert SpeculativeConfig(adapt=True).chosen_verifier == "coupled"
    with pytest.raises(EasySpecError, match=f"threshold` auto cannot sample by {verifier}"):
        SpeculativeConfig(confidence_threshold="auto", verifier=verifier)
    assert SpeculativeConfig(confidence_threshold="auto").chosen_verifier == "coupled"
    assert SpeculativeConfig(confidence_threshold=0.2).chosen_verifier == "rejection"


def test_adapting_where_texts_stay_the_same_leaves_the_verifier():
    for verifier in ("rejection", "block", "coupled"):
        assert SpeculativeConfig(adapt="auto", verifier=verifier).chosen_verifier == verifier
    assert SpeculativeConfig(adapt="auto").chosen_verifier == "rejection"
    assert SpeculativeConfig(adapt="auto", method="tree").chosen_verifier == "coupled"


@pytest.mark.parametrize("adapt", ["on", None, 2])
def test_rounds_adapt_always_never_or_where_texts_stay_the_same(adapt):
    with pytest.raises(EasySpecError, match=f"`adapt` {adapt!r} is not one of True, False, auto"):
        SpeculativeConfig(adapt=adapt)


@pytest.mark.parametrize("other", [{"prompt_lookup": True}, {"tree_width": 4}, {"method": "tree"}])
def test_blocks_are_chains(other):
    with pytest.raises(EasySpecError, match="`verifier` block is for chains"):
        SpeculativeConfig(verifier="block", **other)
    assert SpeculativeConfig(verifier="block").chosen_verifier == "block"


def test_a_verifier_of_ones_own_is_taken_as_it_is():
    assert SpeculativeConfig(verifier=("any", "hashable")).chosen_verifier == ("any", "hashable")
