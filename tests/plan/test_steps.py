"""Steps cost what each method promises, and a round is its steps and a little choosing."""

from dataclasses import replace

import pytest

from easyspec_jax.decode.chunks import PREFILL_SIZES
from easyspec_jax.engine.abstract import absent_mesh
from easyspec_jax.parallel.mesh import MeshShape, open_mesh
from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.steps import Costs, Way, costs, rounds, verification_cost, ways
from tests.support.plans import DRAFT_LAYERS, LEVELS, TARGET_LAYERS, absent, pair


@pytest.fixture(scope="module")
def counted() -> dict[str, Costs]:
    return {way.label: costs(pair(), way, absent) for way in ways([2, 4, 7], 1)}


@pytest.mark.slow
def test_ways_compare_both_placements_of_everything(counted):
    assert list(counted) == [
        "vanilla",
        "sd, draft TP 1",
        "sd, draft TP all",
        "easyspec N=2, draft TP 1",
        "easyspec N=2, draft TP all",
        "easyspec N=4, draft TP 1",
        "easyspec N=4, draft TP all",
        "easyspec N=7, draft TP 1",
        "easyspec N=7, draft TP all",
    ]
    methods = [way.method for way in ways([2], 4)]
    assert methods == ["vanilla", "tree", "tree", "easyspec", "easyspec"]


@pytest.mark.slow
def test_collectives_by_formula(counted):
    assert counted["vanilla"].step.collectives == 2 * TARGET_LAYERS + 1
    assert verification_cost(pair(), absent, 512).collectives == 2 * TARGET_LAYERS + 1
    assert counted["sd, draft TP 1"].step.collectives == 0
    assert counted["sd, draft TP all"].step.collectives == 2 * DRAFT_LAYERS + 1
    for size in (2, 4, 7):
        split, replicated = (counted[f"easyspec N={size}, draft TP {tp}"] for tp in ("all", "1"))
        groups = split.way.layout(DRAFT_LAYERS).groups
        grouped = [group for group in groups if len(group) > 1]
        assert split.step.collectives == len(groups) + DRAFT_LAYERS + 1
        assert replicated.step.collectives == len(grouped)
        assert split.calibration.collectives == 2 * DRAFT_LAYERS + 1
        assert replicated.calibration.collectives == sum(map(len, grouped))


def test_verification_reads_the_root_and_every_drafted_token():
    one, two, three = (
        verification_cost(replace(pair(), num_speculative_tokens=drafted), absent, 512).flops
        for drafted in (1, 2, 3)
    )
    of_token = one // 2
    assert (two, three) == (3 * of_token, 4 * of_token)


def test_mlps_at_once_save_collectives(counted):
    paired = costs(pair(), Way("easyspec", 4, mlp_lp_size=2), absent)
    assert paired.way.label == "easyspec N=4 M=2, draft TP all"
    groups = paired.way.layout(DRAFT_LAYERS).groups
    assert [len(group) for group in groups] == [1, 3, 3, 1]
    # Two for each layer alone, one for each group and each of its pairs, one for the logits.
    assert paired.step.collectives == 2 + 2 + 2 * (1 + 2) + 1
    assert paired.step.bytes == counted["easyspec N=4, draft TP all"].step.bytes


def test_a_refit_is_held_beside_the_drafts_own_projections():
    whole_heads = replace(pair(), mesh="layer=3,tensor=1")
    plain, refit = (
        costs(whole_heads, Way("easyspec", 4, refit=refit), absent) for refit in (False, True)
    )
    config = whole_heads.draft
    outputs = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    # Each device has one layer's projection of both groups: the norm, the weights and the biases.
    held = (
        2 * (config.hidden_size + (config.hidden_size + 1) * outputs) * whole_heads.dtype.itemsize
    )
    assert refit.draft_bytes - plain.draft_bytes == held
    assert (refit.step.collectives, refit.calibration) == (
        plain.step.collectives,
        plain.calibration,
    )


def test_a_round_is_its_steps_and_a_little_choosing(counted):
    verification = verification_cost(pair(), absent, counted["sd, draft TP all"].capacity)
    for found in counted.values():
        if found.calibration is None:
            continue
        steps = found.calibration + found.step * (LEVELS - 1) + verification
        rest = found.round.collectives - steps.collectives
        assert 0 < rest <= 2 * LEVELS + 2, found.way
        # The rest: 128 candidates a level, no pass through a model.
        assert 0 <= found.round.bytes - steps.bytes < 0.1 * steps.bytes, found.way


def test_prefill_goes_chunk_by_chunk(counted, monkeypatch):
    def prefill(tokens: int) -> Cost:
        return costs(replace(pair(), prompt_length=tokens), Way("vanilla"), absent).prefill

    assert counted["vanilla"].prefill == prefill(400)  # one chunk of 512
    monkeypatch.setitem(PREFILL_SIZES, "tpu", (128,))
    one, two, three = prefill(100), prefill(200), prefill(300)
    assert (three.bytes + one.bytes, three.flops + one.flops) == (2 * two.bytes, 2 * two.flops)
    # Only the last chunk has logits: one product of the head, and collectives to choose an id.
    assert one.bytes < two.bytes < 2 * one.bytes
    assert two.collectives < 2 * one.collectives


def test_the_draft_reads_prompts_behind_the_target(counted):
    """So a first token takes as long as without a draft, wherever that is."""
    vanilla = counted["vanilla"]
    assert vanilla.first_token == vanilla.prefill
    for label in ("sd, draft TP 1", "sd, draft TP all"):
        found = counted[label]
        assert found.first_token == vanilla.prefill
        assert found.prefill.flops > found.first_token.flops


def test_a_replicated_draft_is_held_whole(counted):
    replicated, split = counted["sd, draft TP 1"], counted["sd, draft TP all"]
    assert replicated.target_bytes == split.target_bytes == counted["vanilla"].target_bytes
    assert replicated.draft_bytes > 6 * split.draft_bytes
    assert counted["vanilla"].draft_bytes == 0
    assert (
        replicated.memory
        == replicated.target_bytes + replicated.draft_bytes + replicated.cache_bytes
    )


def test_meshes_are_split_as_for_generate(counted):
    assert counted["vanilla"].mesh == counted["sd, draft TP 1"].mesh == MeshShape(1, 8)
    assert counted["easyspec N=2, draft TP all"].mesh == MeshShape(2, 4)
    assert counted["easyspec N=7, draft TP all"].mesh == MeshShape(4, 2)


def test_int8_caches_take_and_read_a_byte_a_number():
    """And a scale of four bytes for each head's entry, which only the memory counts."""
    for way in (Way("vanilla"), Way("easyspec", 2)):
        floats = costs(pair(), way, absent)
        int8 = costs(replace(pair(), kv_dtype="int8"), way, absent)
        head_dim = pair().target.head_dim
        assert int8.cache_bytes * 4 * head_dim == floats.cache_bytes * (head_dim + 4)
        assert int8.target_bytes == floats.target_bytes
        assert int8.draft_bytes == floats.draft_bytes
        assert int8.step.bytes < floats.step.bytes
        assert int8.step.flops == floats.step.flops
        assert int8.round.collectives == floats.round.collectives


@pytest.mark.slow
def test_absent_devices_count_as_present_ones():
    """They do so on a CPU, too, where the exact pass branches."""
    way = Way("easyspec", 4)
    there = costs(pair(), way, lambda shape: open_mesh(shape, "cpu"))
    assert there == costs(pair(), way, lambda shape: absent_mesh(shape, "cpu"))
    assert isinstance(there.round, Cost)


@pytest.mark.slow
def test_caches_are_as_large_as_the_engine_makes_them():
    """No larger than `max_length` asks for, though sizes otherwise are powers of two."""
    short = replace(pair(), max_length=300)
    assert costs(short, Way("sd"), absent).capacity == 384


@pytest.mark.slow
def test_trees_widen_steps_and_verification():
    chain, tree = (costs(pair(width), Way("easyspec", 4), absent) for width in (1, 3))
    assert tree.step.flops > 2.5 * chain.step.flops
    assert tree.step.collectives == chain.step.collectives
    three, one = (verification_cost(pair(width), absent, 512) for width in (3, 1))
    assert three.flops > 2 * one.flops


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("way", [Way("easyspec", 4), Way("easyspec", 2, "1"), Way("tree")])
def test_rounds_of_every_depth_lie_on_a_line(way, width):
    """What is interpolated is what a trace of that depth counts."""
    if width == 1 and way.method == "tree":
        way = Way("sd")
    lines = rounds(pair(width), way, absent, deepest=9)
    for levels in (1, LEVELS, 9):
        traced = costs(replace(pair(width), num_speculative_tokens=levels), way, absent)
        found = lines[levels - 1]
        assert found.cost.kernels == traced.round.kernels
        assert found.cost.collectives == traced.round.collectives
        assert found.cost.flops == traced.round.flops
        assert found.cost.bytes == pytest.approx(traced.round.bytes, rel=2e-3)
        # Choosing among a level's candidates, 1 % of what so small a model sends, is no line.
        assert found.cost.wire_bytes == pytest.approx(traced.round.wire_bytes, rel=0.02)
        assert found.memory == traced.memory


@pytest.mark.slow
def test_a_line_ends_where_caches_grow():
    """Texts of 508 tokens and rounds of up to 3 levels need 512 entries, deeper ones 640."""
    tight = replace(pair(), max_length=508)
    lines = rounds(tight, Way("sd"), absent, deepest=6)
    capacities = []
    for levels, found in enumerate(lines, start=1):
        traced = costs(replace(tight, num_speculative_tokens=levels), Way("sd"), absent)
        assert found.memory == traced.memory
        assert found.cost.kernels == traced.round.kernels
        assert found.cost.bytes == pytest.approx(traced.round.bytes, rel=2e-3)
        capacities.append(traced.capacity)
    assert capacities == [512, 512, 512, 640, 640, 640]
