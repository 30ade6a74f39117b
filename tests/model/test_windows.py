"""Masks say what each token of a pass reads, and cuts of a cache hold all of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.model import windows as windows_module
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.model.windows import Nodes, Window, chain_windows, tree_windows
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from tests.support.helpers import on_mesh
from tests.support.models import (
    family_config,
    forward,
    load_target,
    loader,
    partition_specs,
    save_model,
)


def test_a_token_reads_itself_and_what_came_before():
    config = model_config(family_config("smollm2").to_dict())
    (window,) = chain_windows(jnp.array([0, 3]), 2, 6, config)
    assert window.mask.astype(int).tolist() == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
    ]


SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "layer_types": ["full_attention", "sliding_attention"] * 3,
}
"""Options of a Qwen whose layers are of two kinds."""


def test_a_sliding_layer_reads_the_last_tokens():
    config = model_config(family_config("qwen3", **SLIDING).to_dict())
    full, sliding = chain_windows(jnp.array([0, 3]), 2, 6, config)
    assert full.mask.astype(int).tolist() == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
    ]
    assert sliding.mask.astype(int).tolist() == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
        [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]],
    ]


def test_a_node_of_a_sliding_layer_reads_by_position():
    """Nodes 1 and 2 have the same position, so both read the text's last token and the root."""
    config = model_config(family_config("qwen3", **SLIDING).to_dict())
    rows = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    depth, ancestors = jnp.array([[0, 1, 1, 2]]), jnp.asarray([rows], bool)
    _, sliding = tree_windows(Nodes(jnp.array([3]), jnp.array([3]), depth, ancestors), 8, config)
    assert sliding.mask.astype(int).tolist() == [
        [
            [0, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 1, 0, 0],
            [0, 0, 0, 1, 0, 1, 1, 0],
        ]
    ]


@pytest.mark.parametrize(
    "family, options", [("llama3", {}), ("qwen3", SLIDING)], ids=["full", "sliding"]
)
@pytest.mark.parametrize("first", [0, 2])
def test_a_chain_of_nodes_stands_where_a_chain_does(first, family, options):
    """Rows have different lengths, and the nodes from `first` on make the pass."""
    config, text, nodes = (
        model_config(family_config(family, **options).to_dict()),
        np.array([0, 5], np.int32),
        4,
    )
    depth = np.tile(np.arange(nodes, dtype=np.int32), (2, 1))[:, first:]
    ancestors = np.tile(np.tri(nodes, dtype=bool), (2, 1, 1))[:, first:]
    nodes_of_rows = Nodes(*map(jnp.asarray, (text + first, text, depth, ancestors)))
    window = tree_windows(nodes_of_rows, 12, config)
    expected = chain_windows(jnp.asarray(text + first), nodes - first, 12, config)
    jax.tree.map(np.testing.assert_array_equal, window, expected)


def test_a_node_reads_the_text_and_its_own_path():
    ancestors = jnp.asarray([[[True, False, False], [True, True, False], [True, False, True]]])
    nodes = Nodes(jnp.array([2]), jnp.array([2]), jnp.array([[0, 1, 1]]), ancestors)
    (window,) = tree_windows(nodes, 6, model_config(family_config("smollm2").to_dict()))
    assert window.mask.astype(int).tolist() == [
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]]
    ]


PATHS = ((0,), (0, 1), (0, 2), (0, 2, 3), (0, 1, 4), (0, 2, 5), (0, 2, 5, 6))
"""Path from the root to each node of a tree, in the order of the nodes."""


@pytest.mark.parametrize(
    "family, options",
    [
        ("smollm2", {}),
        ("qwen3", SLIDING | {"sliding_window": 2, "layer_types": SLIDING["layer_types"][:2]}),
    ],
    ids=["full", "sliding"],
)
def test_a_node_of_a_tree_is_the_end_of_a_chain(tmp_path, family, options, monkeypatch):
    """Logits after a node are those after its path as plain text.

    All nodes in one pass, as verified, or level by level, as drafted.
    """
    found, expected = logits_of_nodes(tmp_path, family, options)
    for logits in found:
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    if options:
        # A planted fault: what a node reads of its path depends on entries, not on positions.
        monkeypatch.setattr(windows_module, "_slides", lambda *_: False)
        found, _ = logits_of_nodes(tmp_path, family, options)
        assert all(np.abs(logits - expected).max() > 1e-2 for logits in found)


def logits_of_nodes(tmp_path, family, options) -> tuple[list[np.ndarray], np.ndarray]:
    """Return logits after each node, found in one pass and in four; and after its path."""
    save_model(tmp_path, family, num_hidden_layers=2, **options)
    from_ = loader(open_checkpoint(tmp_path), MeshShape(1, 1))
    model, random = load_target(from_), np.random.default_rng(0)
    lengths, size = np.array([9, 5], np.int32), len(PATHS)
    text, tokens = (random.integers(0, 300, size=(2, n)).astype(np.int32) for n in (9, size))
    depth = np.array([len(path) - 1 for path in PATHS], np.int32)
    ancestors = np.array([[node in path for node in range(size)] for path in PATHS])

    def body(
        model: Decoder, text: jax.Array, tokens: jax.Array, lengths: jax.Array
    ) -> list[jax.Array]:
        def in_passes(*counts: int) -> jax.Array:
            _, caches = model(text, model.init_caches(2, 9 + size), jnp.zeros(2, jnp.int32))
            logits, first = [], 0
            for count in counts:
                here = slice(first, first + count)
                own = (jnp.broadcast_to(x[here], (2, *x[here].shape)) for x in (depth, ancestors))
                h, caches = model(tokens[:, here], caches, Nodes(lengths + first, lengths, *own))
                logits.append(model.logits(h))
                first += count
            return jnp.concatenate(logits, axis=1)

        return [in_passes(7), in_passes(1, 2, 3, 1)]

    specs = (partition_specs(model), P(), P(), P())
    results = on_mesh(MeshShape(1, 1), body, specs, P(None, None, ALL_AXES))(
        model, text, tokens, lengths
    )

    chains = np.zeros((2, size, 9 + max(map(len, PATHS))), np.int32)
    for row, length in enumerate(lengths):
        for node, path in enumerate(PATHS):
            chains[row, node, : length + len(path)] = [
                *text[row, :length],
                *tokens[row, list(path)],
            ]
    expected = forward(model, from_.mesh, chains.reshape(2 * size, -1)).reshape(
        2, size, chains.shape[2], -1
    )
    expected = expected[np.arange(2)[:, None], np.arange(size), lengths[:, None] + depth]
    return [np.asarray(logits)[..., :300] for logits in results], expected[..., :300]


CAPACITY = 64


def sliding_windows(tree: bool, root: np.ndarray) -> Window:
    """Return the window of sliding layers, of chains or of trees, for rows that end anywhere."""
    config = model_config(family_config("qwen3", **SLIDING).to_dict())
    if not tree:
        return chain_windows(jnp.asarray(root), 4, CAPACITY, config)[1]
    depth = np.array([len(path) - 1 for path in PATHS], np.int32)
    ancestors = np.array([[node in path for node in range(len(PATHS))] for path in PATHS])
    # The last four nodes make the pass.
    of_rows = (np.broadcast_to(x[3:], (len(root), *x[3:].shape)) for x in (depth, ancestors))
    nodes = Nodes(*map(jnp.asarray, (root + 3, root, *of_rows)))
    return tree_windows(nodes, CAPACITY, config)[1]


@pytest.fixture
def small_cuts(monkeypatch):
    """Let small caches be cut too."""
    monkeypatch.setattr(windows_module, "ALIGNMENT", 4)


def test_missing_nodes_of_trees_read_themselves():
    """Or their keys and values would be NaN, which a weight of 0 does not hide."""
    config = model_config(family_config("qwen3", **SLIDING).to_dict())
    # A path of four, of which all nodes but the first are missing; each has the root and itself.
    depth, ancestors = np.arange(5, dtype=np.int32)[None], np.eye(5, dtype=bool)[None]
    ancestors[:, :, 0] = True
    root = jnp.array([3])
    nodes = Nodes(root, root, jnp.asarray(depth), jnp.asarray(ancestors))
    for window in tree_windows(nodes, CAPACITY, config):
        own = np.asarray(window.mask)[0, np.arange(5), 3 + np.arange(5)]
        assert own.all()


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_cut_holds_all_that_may_be_read(tree, small_cuts):
    root = np.array([0, 1, 2, 17, 40, CAPACITY - 7], np.int32)
    window = sliding_windows(tree, root)
    assert window.size == (12 if tree else 8)
    assert int(window.cut_mask.sum()) == int(window.mask.sum())
    entries = jnp.arange(CAPACITY)
    taken = window.cut(jnp.broadcast_to(entries[None, :, None], (2 * len(root), CAPACITY, 1)))
    # Two heads a row, and the same entries of both: those that the cut mask is about.
    assert window.first is not None
    expected = np.asarray(window.first)[:, None] + np.arange(window.size)
    np.testing.assert_array_equal(taken[..., 0].reshape(len(root), 2, -1)[:, 0], expected)
    np.testing.assert_array_equal(taken[::2], taken[1::2])
    own = np.take_along_axis(np.asarray(window.mask), expected[:, None, :], axis=2)
    np.testing.assert_array_equal(window.cut_mask, own)
    # A planted fault: cuts that begin one entry later miss some.
    later = replace(window, first=window.first + 1)
    assert int(later.cut_mask.sum()) < int(window.mask.sum())


def test_only_large_caches_are_cut():
    root = np.array([5], np.int32)
    config = model_config(family_config("qwen3", **SLIDING).to_dict())
    small, large = (chain_windows(jnp.asarray(root), 4, size, config) for size in (256, 512))
    assert [window.size for window in small] == [0, 0]
    assert [window.size for window in large] == [0, 128]  # full layers read everything
    uncut = chain_windows(jnp.asarray(root), 4, 512, config, cuts=False)
    assert [window.size for window in uncut] == [0, 0]
    assert large[1].everywhere.size == 0 and large[1].everywhere.cut_mask.shape[-1] == 512


@pytest.fixture
def small_parts(monkeypatch):
    """Let parts of small caches be read."""
    monkeypatch.setattr(windows_module, "SHORTEST", 8)
    monkeypatch.setattr(windows_module, "LARGE", 16)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("roots", [[0, 2], [0, 5], [1, 12], [17, 3], [40, 0]], ids=str)
def test_a_part_is_the_shortest_that_holds_what_any_row_reads(tree, roots, small_parts):
    root, nodes = np.array(roots, np.int32), np.arange(4)
    config = model_config(family_config("smollm2").to_dict())
    if tree:
        ancestors = np.broadcast_to(nodes[:, None] >= nodes, (2, 4, 4))
        of_rows = root, root, np.broadcast_to(nodes.astype(np.int32), (2, 4)), ancestors
        (window,) = tree_windows(Nodes(*map(jnp.asarray, of_rows)), 50, config, parts=True)
    else:
        (window,) = chain_windows(jnp.asarray(root), 4, 50, config, parts=True)
    assert window.parts == (8, 16, 32, 50) and window.part is not None
    part = int(window.part)
    assert not window.mask[..., window.parts[part] :].any()
    assert part == 0 or window.mask[..., window.parts[part - 1] :].any()


def test_parts_are_known_only_where_asked_for(small_parts):
    root, config = jnp.array([5]), model_config(family_config("smollm2").to_dict())
    for capacity, cuts, parts in ((12, True, True), (50, True, False), (50, False, True)):
        (window,) = chain_windows(root, 4, capacity, config, cuts, parts)
        assert window.parts == () and window.part is None
