"""A pair takes the memory that was predicted."""

from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np
import pytest

from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.engine import needs as module
from easyspec_jax.engine.abstract import absent_mesh, abstract_state
from easyspec_jax.engine.fits import GIB
from easyspec_jax.engine.needs import needed
from easyspec_jax.engine.pair import open_model
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.plan.configurations import bundled
from tests.support.workloads import large

PROMPT, TOKENS, ROWS = 120, 512, 2


@pytest.mark.parametrize("refit", ["none", "auto"])
def test_the_demo_pair_takes_what_was_predicted(refit):
    """Weights and caches to the byte; XLA's temporaries of a pass are 0.65 to 1 of the estimate."""
    engine = open_model(mesh="4", platform="cpu", speculative=SpeculativeConfig(refit=refit))
    sampling = SamplingParams()
    need = needed(engine.workload(TOKENS, PROMPT, ROWS, sampling))
    arrays = jax.tree.leaves(engine.load())
    assert need.weights == sum(array.nbytes for array in arrays)
    programs = engine.programs(sampling)
    growing = programs.sizes.capacities(PROMPT, TOKENS - PROMPT)[-2:]
    assert len(growing) == 2
    states = [programs.start(sampling, [0] * ROWS, size) for size in growing]
    caches = jax.tree.leaves([(state.target, state.draft, state.text) for state in states])
    assert need.caches == sum(
        shard.data.nbytes for array in caches for shard in array.addressable_shards
    )
    (size,) = programs.sizes.chunks(PROMPT, growing[-1], ROWS)
    temporary = _temporary(programs, growing[-1], size)
    assert 0.65 * need.working <= engine.mesh.size * temporary <= need.working


def _temporary(programs: Programs, capacity: int, size: int) -> int:
    """Return the bytes of XLA's temporaries while a model reads a chunk of every prompt."""
    *chunk, last = [
        jax.ShapeDtypeStruct(*of)
        for of in (((ROWS, size), np.int32), ((ROWS,), np.int32), ((ROWS,), bool))
    ]
    state, steps = abstract_state(programs, ROWS, capacity), cast("Any", programs.compiled)
    target = steps.prefill.lower(programs.leaves, state, *chunk, last)
    draft = steps.prefill_draft.lower(programs.leaves, state, *chunk)
    compiled = [lowered.compile() for lowered in (target, draft)]
    return max(step.memory_analysis().temp_size_in_bytes for step in compiled)


@pytest.mark.parametrize("mesh", ["1", "4"])
def test_int8_caches_take_what_was_predicted(mesh):
    """A byte a number and four for each entry's scale, in both models' caches."""
    needs, sampling = [], SamplingParams()
    for kv_dtype in ("auto", "int8"):
        engine = open_model(mesh=mesh, platform="cpu", kv_dtype=kv_dtype)
        needs.append(need := needed(engine.workload(TOKENS, PROMPT, ROWS, sampling)))
        programs = engine.programs(sampling)
        held = 0
        for size in programs.sizes.capacities(PROMPT, TOKENS - PROMPT)[-2:]:
            state = programs.start(sampling, [0] * ROWS, size)
            for array in jax.tree.leaves((state.target, state.draft, state.text)):
                held += sum(shard.data.nbytes for shard in array.addressable_shards)
        assert need.caches == held
    floats, int8 = needs
    # Heads of 64 numbers in the target and of 32 in the draft.
    assert floats.caches * (64 + 4) / (4 * 64) < int8.caches < floats.caches * (32 + 4) / (4 * 32)
    assert int8.weights == floats.weights


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("prompt", [PROMPT, 20])
def test_products_by_quantized_matrices_are_counted(weights, prompt):
    """On a CPU, floats of all matrices; and where these have groups, the sums of one."""
    sampling, needs, taken = SamplingParams(), [], []
    for kept in (None, weights):
        engine = open_model(mesh="1", platform="cpu", weights=kept, draft_weights=kept)
        needs.append(needed(engine.workload(TOKENS, prompt, ROWS, sampling)).working)
        programs = engine.programs(sampling)
        capacity = programs.sizes.capacities(prompt, TOKENS - prompt)[-1]
        size = max(programs.sizes.chunks(prompt, capacity, ROWS))
        taken.append(_temporary(programs, capacity, size))
    more = needs[1] - needs[0]
    assert 0.75 * more < taken[1] - taken[0] <= more


@pytest.mark.parametrize("tokens, size", [(21, 7168 * 64 * 21 * 4), (512, 7168 * 8192 * 2)])
def test_what_groups_take_is_counted_on_accelerators_too(tokens, size):
    """A product of 7168 outputs writes sums of 64 groups for 21 tokens, and bfloat16 for 512."""
    for kept in (None, "int8", "int4"):
        job = large(target_weights=kept)
        target, _ = module._of_models(job)[0]
        assert module._of_products(target, job, tokens) == (size if kept == "int4" else 0)


def test_sums_of_all_experts_are_counted():
    """21 tokens go through all 128 experts; gate and up have 192 outputs each, in 32 groups."""
    plain = RoundConfig.of(SpeculativeConfig(method="vanilla"), SamplingParams(), ())
    job = large(target=bundled()["Qwen3-235B-A22B"], target_weights="int4", round=plain)
    target, _ = module._of_models(job)[0]
    floats, _ = module._of_models(replace(job, target_weights=None))[0]
    more = module._of_products(target, job, 21) - module._of_products(floats, job, 21)
    inner, groups = 2 * 192, 4096 // 128
    assert more == 128 * inner * groups * 21 * 4


def test_sums_of_whole_experts_are_counted():
    """Rounds that verify six tokens are split so that a device has 16 experts of 1,536 channels."""
    job = large(target=bundled()["Qwen3-235B-A22B"], target_weights="int4")
    target, _ = module._of_models(job)[0]
    sums, results = 2 * 1536 * (4096 // 128), 3 * 1536 + 4096
    assert module._of_products(target, job, 21) == 16 * (sums + results) * 21 * 4


def test_the_kernel_of_a_gpu_writes_no_sums_of_groups():
    """For a prompt's 512 tokens the matrix becomes floats, as on TPUs."""
    job = large(target_weights="int4", mesh=absent_mesh(MeshShape(4, 2), "gpu"))
    target, _ = module._of_models(job)[0]
    assert module._of_products(target, job, 21) == 0
    assert module._of_products(target, job, 512) == 7168 * 8192 * 2


def test_a_fuzzy_pass_multiplies_by_all_slots_at_once():
    """Sums for eight tokens: 384 outputs of a device, in 16 groups, in each of seven slots."""
    job = large(
        mesh=absent_mesh(MeshShape(1, 8), "tpu"),
        layout=Layout.uniform(paper_groups(16, 8)),
        draft_weights="int4",
        rows=8,
    )
    _, draft = module._of_models(job)[0]
    assert draft is not None and module._of_products(draft, job, 1) == 7 * 384 * 16 * 8 * 4


def test_penalties_count_tokens_for_every_node():
    """In two more arrays of float32, as wide as a device's padded share of the logits."""
    speculative = SpeculativeConfig(tree_width=8, num_speculative_tokens=16)
    plain, penalized = (
        large(prompt=1, tokens=200, round=RoundConfig.of(speculative, sampling, ()))
        for sampling in (SamplingParams(), SamplingParams(frequency_penalty=1.0))
    )
    nodes, vocabulary = 1 + plain.round.verified, 16128
    more = needed(penalized).working - needed(plain).working
    assert more == 2 * 4 * nodes * vocabulary


def test_a_pair_of_70b_takes_what_xla_says():
    """17.09 GiB of each of 8 TPUs, in docs/architecture.md."""
    assert needed(large()).total / GIB == pytest.approx(17.09, rel=0.02)


def test_what_is_held_is_not_counted_again():
    whole, draft_only = needed(large()), needed(large(target_held=True))
    assert needed(large(target_held=True, draft_held=True)).weights == 0
    assert 0 < draft_only.weights < whole.weights / 10
    assert draft_only.caches == whole.caches


def test_a_replicated_draft_is_whole_on_every_device():
    job = large(draft_axes=(), layout=Layout.uniform(paper_groups(16, 1)))
    draft = needed(replace(job, target_held=True)).weights
    assert draft == pytest.approx(
        needed(replace(job, target_held=True, draft_axes=ALL_AXES)).weights * 8, rel=0.01
    )


def test_the_store_of_prefixes_is_counted_to_the_byte():
    """On virtual devices, which share one memory, the bytes of all of them."""
    engine = open_model(mesh="4", platform="cpu", prefix_cache=64 * 2**20)
    sampling = SamplingParams(max_new_tokens=4)
    need = needed(engine.workload(TOKENS, PROMPT, ROWS, sampling))
    without = open_model(mesh="4", platform="cpu")
    assert need.prefixes == 64 * 2**20
    assert (
        need.total - need.prefixes == needed(without.workload(TOKENS, PROMPT, ROWS, sampling)).total
    )
    list(engine.generate(["def add(a, b):" * 20], sampling))
    assert engine.prefixes is not None
    held = 0
    for prefix in engine.prefixes._held:
        for array in jax.tree.leaves(prefix.caches):
            held += sum(shard.data.nbytes for shard in array.addressable_shards)
    assert engine.prefixes.bytes == held > 0
