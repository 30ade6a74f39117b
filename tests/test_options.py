"""Choices are checked where they are made, and named as their flags are."""

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams, SpeculativeConfig, resolve_dtype


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


@pytest.mark.parametrize("other", [{"prompt_lookup": True}, {"tree_width": 4}, {"method": "tree"}])
def test_blocks_are_chains(other):
    with pytest.raises(EasySpecError, match="`verifier` block is for chains"):
        SpeculativeConfig(verifier="block", **other)
    assert SpeculativeConfig(verifier="block").chosen_verifier == "block"


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("temperature", -0.1, "`temperature`"),
        ("temperature", float("inf"), "`temperature`"),
        ("temperature", float("nan"), "`temperature`"),
        ("temperature", 1e39, "`temperature`"),  # infinite in float32
        ("temperature", 1e-40, "`temperature`"),
        ("seed", -1, "`seed`"),
        ("seed", 0.5, "`seed` 0.5 must be a whole number"),
        ("seed", 2**32, "`seed`"),
        ("max_new_tokens", 0, "`max_new_tokens`"),
        ("min_p", -0.1, "`min_p`"),
        ("min_p", float("nan"), "`min_p`"),
        ("logit_bias", {-1: 1.0}, "`logit_bias` -1 must be at least 0: an id"),
        ("logit_bias", {1: float("nan")}, "`logit_bias` nan of id 1"),
        ("frequency_penalty", float("nan"), "`frequency_penalty`"),
        ("repetition_penalty", float("inf"), "`repetition_penalty`"),
        ("prompt_logprobs", -1, "`prompt_logprobs`"),
        ("bad_words", "word", "`bad_words` takes several texts"),
        ("bad_words_ids", ((),), "`bad_words_ids` holds a sequence of no ids"),
        ("n", 0, "`n` 0 must be at least 1"),
    ],
)
def test_sampling_params_name_the_flag(field, value, flag):
    with pytest.raises(EasySpecError, match=flag):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 1e-3),
        ("temperature", 1e38),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("max_new_tokens", 1),
    ],
)
def test_sampling_params_accept_their_bounds(field, value):
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_sampling_params_are_hashable_and_equal_however_they_are_given():
    one = SamplingParams(logit_bias={3: 1, 1: 2.0}, stop_token_ids=(4, 4), bad_words_ids=((1, 2),))
    other = SamplingParams(
        logit_bias=[(1, 2.0), (3, 1.0)],
        stop_token_ids=[4],  # pyright: ignore[reportArgumentType]
        bad_words_ids=[[1, 2]],  # pyright: ignore[reportArgumentType]
    )
    assert one == other
    assert len({one, other}) == 1


def test_automatic_dtype_is_the_checkpoints_but_wide_on_a_cpu():
    assert resolve_dtype("auto", "gpu", "bfloat16") == "bfloat16"
    assert resolve_dtype("auto", "cpu", "bfloat16") == "float32"
    assert resolve_dtype("float16", "cpu", "bfloat16") == "float16"
    assert resolve_dtype("float32", "gpu", "int8") == "float32"
    with pytest.raises(EasySpecError, match="dtype 'int8' is not supported; give `dtype`"):
        resolve_dtype("auto", "gpu", "int8")


def test_a_verifier_of_ones_own_is_taken_as_it_is():
    assert SpeculativeConfig(verifier=("any", "hashable")).chosen_verifier == ("any", "hashable")


def test_one_string_is_no_list_of_stops():
    with pytest.raises(EasySpecError, match="put one into a tuple"):
        SamplingParams(stop="one")  # pyright: ignore[reportArgumentType]
