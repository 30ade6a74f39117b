"""A fuzzy pass is the paper's Algorithm 2, an exact pass is the model; costs are as stated."""

import copy
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.draft.grouping import Layout, format_layout, paper_groups
from easyspec_jax.draft.layer_group import LayerGroup, load_block, load_draft, run_fuzzy
from easyspec_jax.draft.refit_file import refit_shapes
from easyspec_jax.draft.sites import named, prior, stale_sites
from easyspec_jax.model.transformer import run_exact
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.parallel.platforms import PlatformSettings
from tests.support.models import (
    forward,
    load_target,
    loader,
    partition_specs,
    save_model,
    some_refit,
)

MESHES = [MeshShape(1, 1), MeshShape(4, 2), MeshShape(2, 4), MeshShape(8, 1)]
GROUPS = [(range(0, 1), range(1, 4), range(4, 8)), (range(0, 1), range(1, 8))]
EXACT = Layout.uniform(paper_groups(8, 1))
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 40))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A checkpoint of eight layers, and its model in transformers."""
    directory = tmp_path_factory.mktemp("draft")
    reference = save_model(directory, "smollm2", num_hidden_layers=8)
    return open_checkpoint(directory), reference


@torch.no_grad()
def algorithm_2(reference, layout: Layout, refit=None, window: int = 0) -> np.ndarray:
    """Run the paper's fuzzy pass with transformers' own modules.

    window: how many tokens a sliding layer reads.

    Attentions run on the group's input, MLPs in order. Of MLPs that run at once, each is fed what
    came before the first of them, and the attention outputs up to its own.
    """
    model = reference.model
    layers = [with_refit(layer, index, refit) for index, layer in enumerate(model.layers)]
    ids = torch.from_numpy(TOKENS)
    h = model.embed_tokens(ids)
    length = ids.shape[1]
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    own = [(kind,) if "full_attention" in model.config.rope_parameters else () for kind in types]
    positions = [model.rotary_emb(h, torch.arange(length)[None], *kind) for kind in own]
    window = window or getattr(model.config, "sliding_window", None) or length
    hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    too_old = torch.ones_like(hidden).tril(-window)
    masks = {
        name: torch.zeros(length, length).masked_fill(mask, -torch.inf)
        for name, mask in (("full_attention", hidden), ("sliding_attention", hidden | too_old))
    }
    multiplier = getattr(model.config, "residual_multiplier", 1.0)
    if multiplier != 1.0:
        h = h * model.config.embedding_multiplier
    for group, mlps in layout:
        attended = {}
        for index in group:
            before, after, _, _ = norms_of(layers[index])
            output, _ = layers[index].self_attn(
                before(h),
                position_embeddings=positions[index],
                attention_mask=masks[types[index]][None, None],
            )
            attended[index] = multiplier * after(output)
        for first in group[::mlps]:
            outputs = []
            for index in range(first, min(first + mlps, group.stop)):
                h = h + attended[index]
                _, _, before, after = norms_of(layers[index])
                outputs.append(multiplier * after(layers[index].mlp(before(h))))
            h = h + sum(outputs)
    logits = reference.lm_head(model.norm(h)) / getattr(model.config, "logits_scaling", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return (logits if cap is None else torch.tanh(logits / cap) * cap).numpy()


def norms_of(layer) -> tuple[Any, Any, Any, Any]:
    """Return the norms before and after a layer's attention, and before and after its MLP."""
    if not hasattr(layer, "post_feedforward_layernorm"):
        return layer.input_layernorm, nothing, layer.post_attention_layernorm, nothing
    return (
        getattr(layer, "input_layernorm", nothing),
        layer.post_attention_layernorm,
        getattr(layer, "pre_feedforward_layernorm", nothing),
        layer.post_feedforward_layernorm,
    )


def nothing(x):
    return x


def with_refit(layer, index, refit):
    """Return a layer with a refit's tensors in place of its own."""
    if refit is None:
        return layer
    layer = copy.deepcopy(layer)
    for name, values in refit.tensors.items():
        if name.startswith(f"model.layers.{index}."):
            *path, leaf = name.split(".")[3:]
            setattr(
                layer.get_submodule(".".join(path)),
                leaf,
                torch.nn.Parameter(torch.from_numpy(values)),
            )
    return layer


@pytest.mark.parametrize("axes", [ALL_AXES, ()], ids=["split", "replicated"])
@pytest.mark.parametrize("groups", GROUPS, ids=["groups of 3 and 4", "group of 7"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_fuzzy_pass_is_algorithm_2(pair, mesh, groups, axes):
    checkpoint, reference = pair
    from_ = loader(checkpoint, mesh, axes)
    logits = forward(load_draft(from_, Layout.uniform(groups)), from_.mesh, TOKENS, run=run_fuzzy)
    expected = algorithm_2(reference, Layout.uniform(groups))
    np.testing.assert_allclose(logits[..., :300], expected, atol=1e-4, rtol=0)
    exact = algorithm_2(reference, EXACT)
    assert np.abs(expected - exact).max() > 0.1, "the test could not tell fuzzy from exact"


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """A checkpoint whose layers slide but for every third, and its model in transformers."""
    directory = tmp_path_factory.mktemp("sliding")
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    options = {"use_sliding_window": True, "sliding_window": 5, "layer_types": types[:8]}
    reference = save_model(directory, "qwen3", num_hidden_layers=8, **options)
    return open_checkpoint(directory), reference


@pytest.mark.parametrize("mesh", MESHES[:3], ids=str)
def test_layers_of_a_group_slide_each_for_itself(sliding, mesh):
    """A group has layers of both kinds, and slots that are empty."""
    checkpoint, reference = sliding
    from_ = loader(checkpoint, mesh)
    for layout, run in ((Layout.uniform(GROUPS[0]), run_fuzzy), (EXACT, run_exact)):
        model = load_draft(from_, Layout.uniform(GROUPS[0]))
        logits = forward(model, from_.mesh, TOKENS, run=run)[..., :300]
        expected = algorithm_2(reference, layout, window=5)
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
        # Planted faults: all layers of the model are of one kind, or windows are one too wide.
        assert np.abs(expected - algorithm_2(reference, layout, window=40)).max() > 1e-2
        assert np.abs(expected - algorithm_2(reference, layout, window=6)).max() > 1e-2
    # The reference itself is transformers'.
    with torch.no_grad():
        exact = reference(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(algorithm_2(reference, EXACT, window=5), exact, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [ALL_AXES, ()], ids=["split", "replicated"])
@pytest.mark.parametrize(
    "layout, refitted",
    [
        (Layout.uniform(GROUPS[0], 2), False),
        *((Layout.uniform(GROUPS[0], mlps), True) for mlps in (1, 2, 3, 7)),
        (Layout(GROUPS[0], (1, 3, 2)), True),
    ],
    ids=lambda value: format_layout(value) if isinstance(value, Layout) else None,
)
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshShape(1, 1), marks=pytest.mark.exhaustive),
        MeshShape(4, 2),
        pytest.param(MeshShape(2, 4), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_mlps_at_once_and_refit_projections(pair, mesh, layout, refitted, axes):
    checkpoint, reference = pair
    from_ = loader(checkpoint, mesh, axes)
    refit = some_refit(checkpoint, layout) if refitted else None
    draft = load_draft(from_, layout, refit)
    expected = algorithm_2(reference, layout, refit)
    np.testing.assert_allclose(
        forward(draft, from_.mesh, TOKENS, run=run_fuzzy)[..., :300], expected, atol=1e-4
    )
    assert np.abs(expected - algorithm_2(reference, Layout.uniform(GROUPS[0]))).max() > 0.05
    exact = algorithm_2(reference, EXACT)
    np.testing.assert_allclose(forward(draft, from_.mesh, TOKENS)[..., :300], exact, atol=1e-4)


@pytest.mark.parametrize("run", [run_exact, run_fuzzy], ids=["exact", "fuzzy"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama with biases", "granite", "phi3"])
def test_what_families_differ_in_goes_with_its_layers(tmp_path, family, run):
    reference = save_model(tmp_path, family, num_hidden_layers=8)
    from_ = loader(open_checkpoint(tmp_path), MeshShape(4, 2))
    logits = forward(load_draft(from_, Layout.uniform(GROUPS[0])), from_.mesh, TOKENS, run=run)
    expected = algorithm_2(reference, Layout.uniform(GROUPS[0]) if run is run_fuzzy else EXACT)
    np.testing.assert_allclose(logits[..., :300], expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=["olmo2", "gemma2", "gemma3"])
def normed(request, tmp_path_factory):
    """A checkpoint of a family that norms the outputs of each layer, and its model."""
    directory = tmp_path_factory.mktemp(request.param)
    reference = save_model(directory, request.param, num_hidden_layers=8)
    return open_checkpoint(directory), reference


@pytest.mark.parametrize(
    "mesh, axes, mlps",
    [
        (MeshShape(1, 1), ALL_AXES, 1),
        (MeshShape(4, 2), ALL_AXES, 2),
        pytest.param(MeshShape(2, 4), ALL_AXES, 1, marks=pytest.mark.exhaustive),
        pytest.param(MeshShape(4, 2), (), 3, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_outputs_are_normed_as_wholes(normed, mesh, axes, mlps):
    """Norms of each output, before the next layer's attention output joins it."""
    checkpoint, reference = normed
    from_, layout = loader(checkpoint, mesh, axes), Layout.uniform(GROUPS[0], mlps)
    draft = load_draft(from_, layout)
    exact = algorithm_2(reference, EXACT)
    np.testing.assert_allclose(forward(draft, from_.mesh, TOKENS)[..., :300], exact, atol=1e-4)
    fuzzy = algorithm_2(reference, layout)
    logits = forward(draft, from_.mesh, TOKENS, run=run_fuzzy)
    np.testing.assert_allclose(logits[..., :300], fuzzy, atol=1e-4, rtol=0)
    assert np.abs(fuzzy - exact).max() > 0.05


def test_a_refit_of_the_plain_projections_changes_nothing(normed):
    """Without a norm before them, or with one whose weight lacks 1, they are written as well."""
    checkpoint, _ = normed
    from_, layout = loader(checkpoint, MeshShape(4, 2)), Layout.uniform(GROUPS[0], 2)
    refit: dict[str, np.ndarray] = {}
    for site in stale_sites(layout):
        refit |= named(from_, site, prior(from_, site).astype(np.float32))
    assert refit_shapes(layout, checkpoint.source.shapes()) == Held(refit).shapes()
    plain, refitted = (
        forward(load_draft(from_, layout, held), from_.mesh, TOKENS, run=run_fuzzy)
        for held in (None, Held(refit))
    )
    np.testing.assert_allclose(plain[..., :300], refitted[..., :300], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "mask"])
@pytest.mark.parametrize("groups", GROUPS, ids=["groups of 3 and 4", "group of 7"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_exact_pass_is_the_model(pair, mesh, groups, branch):
    checkpoint, reference = pair
    from_ = loader(checkpoint, mesh)
    draft = load_draft(from_, Layout.uniform(groups))
    for block in draft.blocks:
        if isinstance(block, LayerGroup):
            block.branch = branch
    with torch.no_grad():
        expected = reference(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(
        forward(draft, from_.mesh, TOKENS)[..., :300], expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("run", [run_exact, run_fuzzy], ids=["exact", "fuzzy"])
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "mask"])
def test_kv_of_a_layer_lives_only_where_its_attention_does(pair, run, branch):
    """Two tokens in an empty cache; a group of three layers on a layer axis of four."""
    checkpoint, _ = pair
    from_ = loader(checkpoint, MeshShape(4, 2))
    group: Any = load_draft(from_, Layout.uniform(GROUPS[0])).blocks[1]
    group.branch = branch
    cache = _run(group, from_, run, tokens=2, capacity=4)[1]
    written = np.abs(np.asarray(cache.k)).sum(axis=(1, 3)) > 0
    assert written.tolist() == [[True, True, False, False]] * 3 + [[False] * 4]


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
@pytest.mark.parametrize("size", [3, 4, 7])
def test_collectives_of_a_group(pair, mesh, size):
    """All-reduces, and nothing else: size + 1 in the fuzzy pass and 2 * size in the exact one.

    With replicated MLPs it is one in the fuzzy pass, and size in the exact one.
    """
    checkpoint, _ = pair

    def collectives(axes, run) -> dict[str, int]:
        from_ = loader(checkpoint, mesh, axes)
        group = load_draft(from_, Layout.uniform(single_out(size))).blocks[1]
        text = _run(group, from_, run, tokens=1, capacity=8, compiled=True)
        names = re.findall(r"= \S+ (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)
        return {name: names.count(name) for name in set(names)}

    assert collectives(ALL_AXES, run_fuzzy) == {"all-reduce": size + 1}
    assert collectives(ALL_AXES, run_exact) == {"all-reduce": 2 * size}
    assert collectives((), run_fuzzy) == {"all-reduce": 1}
    assert collectives((), run_exact) == {"all-reduce": size}


@pytest.mark.parametrize("size, mlp_lp_size, expected", [(4, 1, 5), (4, 2, 3)])
def test_norms_of_outputs_add_no_collectives(normed, size, mlp_lp_size, expected):
    """Norms over all heads add one that brings the sums of squares of a whole group."""
    from_ = loader(normed[0], MeshShape(4, 2))
    group = load_draft(from_, Layout.uniform(single_out(size), mlp_lp_size)).blocks[1]
    text = _run(group, from_, run_fuzzy, tokens=1, capacity=8, compiled=True)
    found = len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text))
    assert found == expected + (from_.config.qk_norm == "full")


@pytest.mark.parametrize(
    "size, mlp_lp_size, expected", [(4, 2, 3), (4, 4, 2), (7, 2, 5), (7, 7, 2)]
)
def test_collectives_of_mlps_at_once(pair, size, mlp_lp_size, expected):
    """One for the first attention outputs, one for each step of MLPs; a refit adds none."""
    for refitted in (False, True):
        from_ = loader(pair[0], MeshShape(4, 2))
        layout = Layout.uniform(single_out(size), mlp_lp_size)
        group = load_draft(from_, layout, some_refit(pair[0], layout) if refitted else None).blocks[
            1
        ]
        text = _run(group, from_, run_fuzzy, tokens=1, capacity=8, compiled=True)
        assert len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)) == expected


@pytest.mark.parametrize("size", [3, 4, 7])
def test_one_device_computes_a_groups_attentions_by_batched_products(pair, size):
    """The fuzzy pass has four products for all attentions together, the exact pass four for each.

    They are: queries, keys and values; scores; mixtures; outputs. Each MLP has two more.
    """
    from_ = loader(pair[0], MeshShape(1, 1))
    group = load_draft(from_, Layout.uniform(single_out(size))).blocks[1]

    def products(run) -> int:
        return str(jax.make_jaxpr(partial(_run, group, from_, run, tokens=1, capacity=8))()).count(
            "dot_general["
        )

    assert products(run_fuzzy) == 4 + 2 * size
    assert products(run_exact) == 4 * size + 2 * size


def single_out(size: int) -> tuple[range, ...]:
    """Group eight layers so that the second group has `size` layers and the others one."""
    return (range(0, 1), range(1, 1 + size), *(range(i, i + 1) for i in range(1 + size, 8)))


def _run(group, from_, run, tokens, capacity, compiled=False) -> Any:
    """Run one pass through a group, or return its optimised HLO."""
    from easyspec_jax.model.windows import chain_windows

    @partial(
        jax.shard_map,
        mesh=from_.mesh,
        in_specs=(partition_specs(group), P()),
        out_specs=(P(), group.cache_spec()),
        check_vma=False,
    )
    def body(group, h):
        windows = chain_windows(jnp.zeros(1, jnp.int32), tokens, capacity, from_.config)
        return run(group, h, group.init_cache(1, capacity), windows)

    h = (
        np.random.default_rng(1)
        .normal(size=(1, tokens, from_.config.hidden_size))
        .astype(np.float32)
    )
    program = jax.jit(body)
    return program.lower(group, h).compile().as_text() if compiled else program(group, h)


def test_single_layers_are_ordinary_layers(pair):
    checkpoint, _ = pair
    from_ = loader(checkpoint, MeshShape(4, 2))
    singles = load_draft(from_, Layout.uniform(paper_groups(8, 1)))
    fuzzy = forward(singles, from_.mesh, TOKENS, run=run_fuzzy)
    np.testing.assert_array_equal(fuzzy, forward(load_target(from_), from_.mesh, TOKENS))


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_a_group_is_fused_where_whole_heads_are_rotated(tmp_path, part):
    save_model(tmp_path, "phi3", num_hidden_layers=3, partial_rotary_factor=part)
    from_ = loader(open_checkpoint(tmp_path), MeshShape(1, 1))
    from_ = replace(from_, settings=PlatformSettings(fused_attention=True))
    group = load_block(from_, range(3))
    assert isinstance(group, LayerGroup) and group.fused == (part == 1)
