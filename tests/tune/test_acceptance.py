"""What is told from texts is what decoding accepts."""

from dataclasses import replace

import numpy as np
import pytest

from easyspec_jax.decode.timing import alone
from easyspec_jax.engine.pair import open_model
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.tune.acceptance import _ahead, foresee, mean_round, reach
from tests.support.models import save_model

pytestmark = pytest.mark.slow

LEVELS = 4


def test_reach_follows_the_text_through_the_tree():
    # Two levels of three; nodes 1 to 3 below the root, 4 to 6 below them.
    tokens = np.array([[[0, 7, 8, 9, 1, 2, 3]]])
    parents = np.array([[[0, 0, 0, 0, 2, 1, 3]]])

    scores = np.log([[[1.0, 0.5, 0.3, 0.2, 0.2, 0.19, 0.1]]])

    def reached(width, *following):
        return int(reach(tokens, parents, scores, np.array([[following]]), width)[0][0, 0])

    assert reached(3, 8, 1) == 2
    assert reached(3, 7, 1) == 1  # 1 is not below 7
    assert reached(3, 5, 1) == 0
    assert reached(2, 9, 3) == 0  # third of its level
    assert reached(2, 7, 2) == 2
    assert reached(1, 7, 2) == 2  # the best below the best, though second of its level
    assert reached(1, 8, 1) == 0
    likeliest = [reach(tokens, parents, scores, np.zeros((1, 1, 2)), n)[1] for n in (1, 2)]
    np.testing.assert_allclose(np.exp(likeliest)[:, 0, 0], [[0.5, 0.19], [0.5, 0.2]])


def test_rounds_begin_where_the_last_one_ended():
    reached = np.array([[2, 9, 9, 0, 3, 9, 9, 9], [1, 9, 0, 9, 9, 9, 9, 9]])
    # 0: 2 and one more, 3: 0, 4: 3, 8; 0: 1, 2: 0, 3: capped
    assert mean_round(reached[:1], np.array([8]), 3)[0] == pytest.approx((2 + 0 + 3) / 3)
    assert mean_round(reached, np.array([8, 4]), 3)[0] == pytest.approx((5 + 1 + 0 + 3) / 6)
    assert mean_round(reached[:1], np.array([8]), 1)[0] == pytest.approx(
        (1 + 1 + 1 + 1) / 4
    )  # 0, 2, 4, 6
    assert mean_round(reached, np.array([0, 1]), 2)[0] == 1.0  # a text too short to tell anything
    # Two levels at spot 0 and one elsewhere: 0: 2, 3: 0, 4: 1, 6: 1
    levels = np.array([[2, 1, 1, 1, 1, 1, 1, 1]])
    assert mean_round(reached[:1], np.array([8]), levels) == (1.0, 1.25)


def test_what_lies_ahead():
    np.testing.assert_array_equal(_ahead([5, 6, 7, 8], 3, 2), [[6, 7], [7, 8], [8, -1]])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A pair that sometimes agrees: the draft is the target, whose grouped layers go wrong."""
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3", vocab_size=260, eos_token_id=3, initializer_range=0.05)
    speculative = SpeculativeConfig(lp_size=3, num_speculative_tokens=LEVELS)
    return open_model(directory, directory, mesh="2", speculative=speculative)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("tp", ["all", pytest.param("1", marks=pytest.mark.exhaustive)])
def test_as_many_tokens_as_decoding_accepts(engine, width, tp):
    prompts, sampling = (
        ["Hello", "a longer one, and more of it", "x"],
        SamplingParams(max_new_tokens=160),
    )
    plain = engine.baseline().generate(prompts, sampling)
    texts = [(len(done.prompt_ids), [*done.prompt_ids, *done.token_ids]) for done in plain]
    own = engine.variant(
        replace(engine.speculative, tree_width=width, draft_tensor_parallel_size=tp)
    )
    stats = [done.stats for done in own.generate(prompts, sampling, batch_size=3)]
    total = sum(stats[1:], stats[0])
    foresight = foresee(alone(own.mesh, own.load()[1]), texts, LEVELS, [width])[width]
    found = foresight.accepted()
    assert len(found) == LEVELS
    assert list(found) == sorted(found)
    assert 0.2 < total.acceptance_rate < 0.95
    # Decoding's last rounds are cut short by the limit.
    assert found[-1] == pytest.approx(total.accepted / total.rounds, rel=0.06)
    # A second level below about half of the first ones; none of these is likely, as in any
    # random model.
    threshold = float(np.exp(np.median(foresight.likeliest[..., 0])))
    (end,) = foresight.early_ends([threshold])
    early = own.variant(replace(own.speculative, confidence_threshold=threshold))
    stats = [done.stats for done in early.generate(prompts, sampling, batch_size=3)]
    total = sum(stats[1:], stats[0])
    assert 0.2 < end.steps < 0.8
    assert end.accepted == pytest.approx(total.accepted / total.rounds, rel=0.06)
    assert 1 + end.steps == pytest.approx(total.drafted / total.rounds, rel=0.06)


def test_narrower_trees_are_cut_out_of_wide_ones(engine):
    plain = engine.baseline().generate(["Hello", "b"], SamplingParams(max_new_tokens=100))
    texts = [(len(done.prompt_ids), [*done.prompt_ids, *done.token_ids]) for done in plain]
    programs = alone(engine.mesh, engine.load()[1])
    together = foresee(programs, texts, LEVELS, [1, 2, 4])
    for width in (1, 2):
        own = foresee(programs, texts, LEVELS, [width])[width].accepted()
        assert together[width].accepted() == pytest.approx(own, rel=0.1)
