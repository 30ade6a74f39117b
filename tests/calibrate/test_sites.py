"""From site to site, texts take the way that the layer itself takes."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.calibrate.sites import SITES, onward, square_sums
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.model.device import run
from easyspec_jax.model.windows import chain_windows
from easyspec_jax.parallel.mesh import MeshShape
from tests.support.models import loader, save_model

TEXTS, TOKENS = 2, 40
LAYERS = [
    ("smollm2", 0),
    ("llama with biases", 1),
    ("granite", 0),
    ("olmo2", 1),
    ("gemma3", 0),
    ("gemma3", 2),  # reads all of the text, unlike the first
    ("qwen3", 1),
]


def _whole(layer, config, h):
    start = jnp.zeros((TEXTS,), jnp.int32)
    windows = chain_windows(start, TOKENS, TOKENS, config)
    return layer(h, layer.init_cache(TEXTS, TOKENS), windows)[0]


@pytest.mark.parametrize(("family", "index"), LAYERS)
def test_the_way_through_the_sites_is_the_layers(tmp_path, family, index):
    save_model(tmp_path, family, num_hidden_layers=index + 1)
    from_ = loader(open_checkpoint(tmp_path), MeshShape(1, 1))
    layer = from_.layer(index)
    h = np.random.default_rng(0).normal(size=(TEXTS, TOKENS, from_.config.hidden_size))
    arrays = [h.astype(np.float32)]
    expected = np.asarray(run(from_, _whole, layer, arrays, P()))
    for site in SITES:
        found = run(from_, onward, layer, arrays, (P(),) * site.arrays_onward, site)
        arrays = [np.asarray(x) for x in found]
    np.testing.assert_allclose(arrays[0], expected, atol=1e-5)
    assert len(arrays) == 1 and not np.allclose(expected, h, atol=0.1)


def test_sums_are_those_of_the_inputs(tmp_path):
    save_model(tmp_path, "smollm2", num_hidden_layers=1)
    from_ = loader(open_checkpoint(tmp_path), MeshShape(1, 1))
    layer, hidden = from_.layer(0), from_.config.hidden_size
    h = np.random.default_rng(0).normal(size=(TEXTS, TOKENS, hidden)).astype(np.float32)
    norm = from_.source.read("model.layers.0.input_layernorm.weight")
    x = h.reshape(-1, hidden)
    x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-6) * norm
    found = run(from_, square_sums, layer, [h], P(), SITES[0])
    np.testing.assert_allclose(found, x.T @ x, atol=1e-2)
    # The last site's inputs are those of the down projection.
    inner = from_.config.intermediate_size
    arrays = [h, np.ones((TEXTS, TOKENS, inner), np.float32)]
    found = run(from_, square_sums, layer, arrays, P(), SITES[3])
    np.testing.assert_array_equal(found, np.full((inner, inner), TEXTS * TOKENS))
