"""Layers are grouped as the paper says or as the user says, each exactly once."""

import itertools

import pytest

from easyspec_jax.draft.grouping import Layout, format_layout, paper_groups, parse_layout
from easyspec_jax.errors import EasySpecError

LAYERS = (1, 2, 3, 4, 5, 8, 16, 24, 28, 30, 32, 80)
SIZES = (1, 2, 3, 4, 5, 7, 14, 100)


@pytest.mark.parametrize(
    ("num_layers", "lp_size", "groups"),
    [
        pytest.param(32, 4, "0,1-3,4-7,8-11,12-15,16-19,20-23,24-27,28-30,31", id="Llama-3-8B"),
        pytest.param(28, 4, "0,1-3,4-7,8-11,12-15,16-19,20-23,24-26,27", id="Qwen2-7B"),
        pytest.param(30, 7, "0,1-6,7-13,14-20,21-27,28,29", id="SmolLM2-135M"),
        (6, 1, "0,1,2,3,4,5"),
        (6, 5, "0,1-4,5"),
        (6, 6, "0,1-4,5"),
        (6, 100, "0,1-4,5"),
        *((1, lp_size, "0") for lp_size in SIZES),
        *((2, lp_size, "0,1") for lp_size in SIZES),
        *((3, lp_size, "0,1,2") for lp_size in SIZES),
    ],
)
def test_paper_groups(num_layers, lp_size, groups):
    assert format_layout(Layout.uniform(paper_groups(num_layers, lp_size))) == groups


@pytest.mark.parametrize("lp_size", SIZES)
@pytest.mark.parametrize("num_layers", LAYERS)
def test_paper_groups_cover_each_layer_once_within_their_size_and_survive_a_round_trip(
    num_layers, lp_size
):
    groups = paper_groups(num_layers, lp_size)
    assert list(itertools.chain(*groups)) == list(range(num_layers))
    assert all(1 <= len(group) <= lp_size for group in groups)
    assert len(groups[0]) == len(groups[-1]) == 1
    # Groups begin at multiples of lp_size, except next to the first and the last layer.
    assert all(group.start % lp_size == 0 for group in groups[2:-1])
    layout = Layout.uniform(groups, 2)
    assert parse_layout(format_layout(layout), num_layers) == layout


@pytest.mark.parametrize("borders", range(8))
def test_any_partition_survives_a_round_trip(borders):
    for cuts in itertools.combinations(range(1, 8), borders):
        groups = tuple(range(a, b) for a, b in itertools.pairwise((0, *cuts, 8)))
        for mlps in itertools.product(*(range(1, 1 + len(group)) for group in groups)):
            layout = Layout(groups, mlps)
            assert parse_layout(format_layout(layout), 8) == layout


def test_spaces_and_one_layer_ranges_are_understood():
    expected = Layout((range(0, 1), range(1, 3), range(3, 4)), (1, 1, 1))
    assert parse_layout(" 0-0, 1-2 ,3", 4) == expected


def test_mlps_at_a_time_are_those_of_the_group_or_the_default_but_never_more_than_there_are():
    layout = parse_layout("0,1-3x2,4-6x9,7-9", 10, mlp_lp_size=3)
    assert layout.mlp_lp_sizes == (1, 2, 3, 3)
    assert parse_layout("0,1-3", 4).mlp_lp_sizes == (1, 1)
    assert (layout.sequential_mlps, layout.collectives) == (1 + 2 + 1 + 1, 4 + 5)


@pytest.mark.parametrize(
    ("strategy", "complaint"),
    [
        ("0,1-2,2-3", "names layer 2 twice"),
        ("0,0,1-3", "names layer 0 twice"),
        ("1-3,0", "does not name the layers in order"),
        ("0,1-999999999999", "names layer 999999999999; the draft has 0 to 3"),
        ("0,1-4", "names layer 4; the draft has 0 to 3"),
        ("0,1-3,99999999999", "names layer 99999999999; the draft has 0 to 3"),
        ("0,2-3", "leaves out layer 1"),
        ("0,1-2", "leaves out layer 3"),
        ("1-3", "leaves out layer 0"),
        ("0,3-1", "'3-1' runs backwards"),
        ("", "'' is neither a layer nor a range"),
        ("0,1-3,", "'' is neither a layer nor a range"),
        ("0,1-2-3", "'1-2-3' is neither"),
        ("0,-1,1-3", "'-1' is neither"),
        ("0;1-3", "'0;1-3' is neither"),
        ("0,one", "'one' is neither"),
        ("0,1-3x0", "'1-3x0' is neither"),
        ("0,1-3x", "'1-3x' is neither"),
        ("0,1-3x-2", "'1-3x-2' is neither"),
        ("0,1 - 3", "'1 - 3' is neither"),
    ],
)
def test_a_strategy_that_is_no_partition_is_refused_by_name(strategy, complaint):
    with pytest.raises(EasySpecError) as refusal:
        parse_layout(strategy, 4)
    message = str(refusal.value)
    assert message.startswith(f"`lp_strategy` {strategy!r}")
    assert complaint in message
    assert "\n" not in message
