"""Ways to sample are checked where they are made, and named as their flags are."""

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams


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


def test_one_string_is_no_list_of_stops():
    with pytest.raises(EasySpecError, match="put one into a tuple"):
        SamplingParams(stop="one")  # pyright: ignore[reportArgumentType]
