"""Every split of the mesh with every way to draft, each once."""

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.tune.candidates import Candidate, Space, candidates, splits


def test_splits_leave_no_device_of_the_layer_axis_idle():
    assert splits("8", 4) == [MeshShape(4, 2), MeshShape(2, 4), MeshShape(1, 8)]
    assert splits("8", 7) == [MeshShape(4, 2), MeshShape(2, 4), MeshShape(1, 8)]
    assert splits("6", 3) == [MeshShape(3, 2), MeshShape(2, 3), MeshShape(1, 6)]
    assert splits("8", 1) == [MeshShape(1, 8)]
    assert splits("layer=2,tensor=2", 7) == [MeshShape(2, 2)]


def test_the_first_split_is_the_one_that_the_engine_would_choose():
    first = candidates("8", 12, Space([4], [1], 1, ["all"]))[0]
    speculative = SpeculativeConfig(lp_size=4, tree_width=1, num_speculative_tokens=1, refit="none")
    assert first == Candidate(MeshShape(4, 2), speculative)


def test_every_axis_is_crossed_with_every_other():
    found = candidates("8", 12, Space([1, 2, 4], [1, 4], 3, mlp_lp_sizes=[1]))
    assert len(found) == len(set(found)) == (1 + 2 + 3) * 2 * 2 * 3
    ordinary = [c.speculative for c in found if c.speculative.method != "easyspec"]
    assert {(s.method, s.width) for s in ordinary} == {("sd", 1), ("tree", 4)}
    assert {s.num_speculative_tokens for s in ordinary} == {1, 2, 3}


def test_one_device_has_one_placement():
    found = candidates("1", 12, Space([1, 4], [1], 1))
    assert [(c.speculative.method, c.speculative.draft_tensor_parallel_size) for c in found] == [
        ("sd", "all"),
        ("easyspec", "all"),
    ]
    replicated = candidates("1", 12, Space([4], [1], 1, ["1"]))
    assert [c.speculative.draft_tensor_parallel_size for c in replicated] == ["1"]


def test_sizes_that_give_the_same_groups_are_one_candidate():
    found = candidates("1", 6, Space([4, 5, 6], [1], 1))
    assert [c.speculative.lp_size for c in found] == [4, 5]


def test_mlps_run_at_once_where_that_saves_communication():
    sizes = {
        (c.speculative.lp_size, c.speculative.mlp_lp_size, c.speculative.draft_tensor_parallel_size)
        for c in candidates("2", 12, Space([2, 3], [1], 1, mlp_lp_sizes=[1, 2, 3]))
    }
    shared = {(2, 1, "all"), (2, 2, "all"), (3, 1, "all"), (3, 2, "all"), (3, 3, "all")}
    assert sizes == shared | {(2, 1, "1"), (3, 1, "1")}
    pairs = candidates("2", 12, Space([1, 3], [1], 1, ["all"], mlp_lp_sizes=[2]))
    assert {(c.speculative.method, c.speculative.mlp_lp_size) for c in pairs} == {
        ("sd", 1),
        ("easyspec", 2),
    }
    alone = candidates("1", 12, Space([3], [1], 1))
    assert [c.speculative.mlp_lp_size for c in alone] == [1]


def test_refits_are_taken_where_there_are_any():
    found = candidates("2", 6, Space([4, 5, 6], [1], 1, ["all"], refits={(4, 2), (6, 1)}))
    refits = {
        (c.speculative.lp_size, c.speculative.mlp_lp_size): c.speculative.refit for c in found
    }
    # 5 and 6 give the same groups, but of the latter there is a refit.
    assert refits == {
        (4, 1): "none",
        (4, 2): "auto",
        (5, 1): "none",
        (5, 2): "none",
        (6, 1): "auto",
    }


def test_small_drafts_have_smaller_groups_by_default():
    assert list(Space.of(3).lp_sizes) == [1, 2, 3]
    assert list(Space.of(30).lp_sizes) == [1, 2, 3, 4, 7]
    assert list(Space.of(30, refits=frozenset({(5, 1), (14, 2)})).lp_sizes) == [
        1,
        2,
        3,
        4,
        5,
        7,
        14,
    ]


@pytest.mark.parametrize(
    "space, message",
    [
        (Space([7]), "`lp_sizes` 7 must be from 1 to 6, the draft's layers"),
        (Space([0]), "`lp_sizes` 0 must be from 1 to 6"),
        (Space([2], [65]), "`tree_widths` 65 must be from 1 to 64"),
        (Space([2], [1], 17), "`max_levels` 17 must be from 1 to 16"),
        (Space([]), "nothing to choose from"),
    ],
)
def test_refusals(space, message):
    with pytest.raises(EasySpecError, match=message):
        candidates("8", 6, space)


def test_what_shares_weights_and_what_shares_acceptance():
    four, eight = (
        Candidate(
            MeshShape(4, 2), SpeculativeConfig(tree_width=width, num_speculative_tokens=width)
        )
        for width in (4, 8)
    )
    assert four.draft == eight.draft
    replicated = Candidate(MeshShape(1, 8), SpeculativeConfig(draft_tensor_parallel_size="1"))
    assert replicated.draft != four.draft
    assert replicated.draft.drafting == four.draft.drafting
    ordinary = [
        Candidate(MeshShape(1, 8), SpeculativeConfig(method=method)) for method in ("sd", "tree")
    ]
    assert ordinary[0].draft == ordinary[1].draft
    assert ordinary[0].draft.drafting != four.draft.drafting
