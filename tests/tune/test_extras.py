"""Ways to draft that are tried next to the best prediction."""

from dataclasses import replace

import pytest

from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.tune.acceptance import EarlyEnd
from easyspec_jax.tune.candidates import Candidate
from easyspec_jax.tune.extras import extras, tokens_per_second
from easyspec_jax.tune.predict import Figures, predict

OWN = SpeculativeConfig(method="sd", num_speculative_tokens=2)
BEST = Candidate(MeshShape(1, 1), OWN)
EARLY = (EarlyEnd(0.1, accepted=3.0, steps=5.0), EarlyEnd(0.5, accepted=2.0, steps=1.0))


def figures(step: float) -> Figures:
    """A target's pass takes 10 ms, however many nodes it has."""
    measured = Figures(0.01, 0.0, {2: 0.01, 9: 0.01})
    measured.step[BEST.draft] = {1: step}
    measured.acceptance[BEST.draft.drafting] = {1: (0.8, 1.4, 1.9, 2.2, 2.4, 2.5, 2.6, 2.7)}
    return measured


@pytest.mark.parametrize("step, threshold", [(0.0001, 0.1), (0.005, 0.5)])
def test_the_dearer_a_step_the_sooner_a_draft_ends(step, threshold):
    measured = figures(step)
    found = [c.speculative for c in extras(predict(measured, BEST), measured, EARLY, levels=8)]
    assert found == [
        replace(OWN, num_speculative_tokens=8, confidence_threshold=threshold),
        replace(OWN, adapt=True),
        replace(OWN, prompt_lookup=True),
        replace(OWN, adapt=True, prompt_lookup=True),
    ]


def test_a_round_that_ends_early_takes_less_time():
    deep = Candidate(BEST.shape, replace(OWN, num_speculative_tokens=8))
    # Its first pass and one step of 5 ms each, and the target's 10 ms, for three tokens.
    assert tokens_per_second(predict(figures(0.005), deep), EARLY[1]) == pytest.approx(3 / 0.02)


@pytest.mark.parametrize("early, levels", [((), 8), (EARLY, 1)])
def test_nothing_ends_early_that_was_not_measured_or_has_one_level(early, levels):
    measured = figures(0.001)
    found = extras(predict(measured, BEST), measured, early, levels)
    assert not any(c.speculative.confidence_threshold for c in found)
