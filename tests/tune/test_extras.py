"""Ways to draft that are tried next to the best prediction."""

from dataclasses import replace

import pytest

from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.tune.candidates import Candidate
from easyspec_jax.tune.extras import extras, worth_a_step
from easyspec_jax.tune.predict import Prediction

FIVE = SpeculativeConfig(lp_size=2)


def prediction(speculative: SpeculativeConfig = FIVE, step: float = 0.001) -> Prediction:
    """A round of 10 ms and its further steps, which accepts two tokens."""
    candidate = Candidate(MeshShape(1, 1), speculative)
    return Prediction(candidate, 0.002, step, 0.008, 0.0, accepted=2.0, missing=())


def test_a_step_pays_where_its_token_is_likelier_than_what_it_costs():
    # 3 tokens in 14 ms: in the millisecond of a step, .214 tokens could be decoded.
    assert worth_a_step(prediction()) == 0.21
    assert worth_a_step(prediction(step=10.0)) < 1.0


@pytest.mark.parametrize(
    "levels, step, early", [(5, 0.001, [0.21]), (1, 0.001, []), (5, 0.00001, [])]
)
def test_the_best_way_is_tried_with_each_extra(levels, step, early):
    """Nothing ends early in a round of one level, nor where a step costs next to nothing."""
    own = replace(FIVE, num_speculative_tokens=levels)
    found = [candidate.speculative for candidate in extras(prediction(own, step))]
    assert found == [
        *(replace(own, confidence_threshold=threshold) for threshold in early),
        replace(own, adapt=True),
        replace(own, prompt_lookup=True),
    ]
