"""Groups where they cost least: the search against brute force, the measure against a whole model."""

import itertools

import numpy as np
import pytest

from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.parallel import load_draft
from easyspec_jax.mesh import MeshShape
from easyspec_jax.refit.borders import EVERY, best_groups, measure_groups
from easyspec_jax.refit.fidelity import DEPTHS, fidelity
from tests.models import loader
from tests.refit.conftest import LAYERS, TEXTS


def _groupings(layers: int, lp_size: int):
    """All of them."""
    for count in range(layers):
        for inner in itertools.combinations(range(1, layers), count):
            groups = tuple(range(a, b) for a, b in itertools.pairwise((0, *inner, layers)))
            if max(map(len, groups)) <= lp_size:
                yield groups


@pytest.mark.parametrize(
    "layers, lp_size, mlp_lp_size", [(9, 2, 1), (9, 4, 1), (7, 7, 1), (3, 4, 1), (10, 4, 2), (10, 3, 2), (9, 4, 4)]
)
def test_search_finds_the_best_of_all_groupings(layers, lp_size, mlp_lp_size):
    random = np.random.default_rng(layers * lp_size)
    overlaps = {range(a, b): random.uniform(0.5, 1) ** (b - a) for a in range(layers) for b in range(a + 2, layers + 1)}

    def kept(groups) -> float:
        return float(np.prod([overlaps[group] if len(group) > 1 else 1.0 for group in groups]))

    def mlps(groups) -> int:
        return sum(-(-len(group) // mlp_lp_size) for group in groups)

    paper = paper_groups(layers, lp_size)
    allowed = [g for g in _groupings(layers, lp_size) if len(g) <= len(paper) and mlps(g) <= mlps(paper)]
    best = max(allowed, key=kept)
    found = best_groups(overlaps, layers, lp_size, mlp_lp_size)
    assert found in allowed
    assert kept(found) == pytest.approx(kept(best))


@pytest.mark.parametrize("mesh, mlp_lp_size", [(MeshShape(1, 1), 2), (MeshShape(2, 4), 1)], ids=str)
def test_overlap_of_a_candidate_is_that_of_a_draft_with_this_group_alone(draft, mesh, mlp_lp_size):
    """With a ridge so strong that nothing is refit, the plain draft is the reference."""
    from_ = loader(draft[0], mesh)
    overlaps = measure_groups(from_, Layout(paper_groups(LAYERS, 3), mlp_lp_size), TEXTS, ridge=1e9)
    assert set(overlaps) == {range(a, a + n) for n in (2, 3) for a in range(LAYERS - n + 1)}
    compared, starts = TEXTS[-3:], range(0, TEXTS.shape[1] - DEPTHS + 1, EVERY)
    for group in (range(0, 2), range(3, 6), range(5, 8)):
        groups = (*(range(i, i + 1) for i in range(group.start)), group)
        groups += tuple(range(i, i + 1) for i in range(group.stop, LAYERS))
        model = load_draft(from_, Layout(groups, mlp_lp_size))
        of_depths = []
        for depth in range(DEPTHS):
            counted = np.zeros(compared.shape, bool)
            counted[:, [start + depth for start in starts]] = True
            of_depths.append(fidelity(model, from_.mesh, compared, counted)[0][depth])
        expected = np.exp(np.average(np.log(of_depths), weights=[4, 3, 2, 1]))
        assert overlaps[group] == pytest.approx(expected, abs=1e-4)
    assert min(overlaps.values()) < 0.9, "candidates that lose nothing would prove nothing"
