"""From site to site, both streams take the way that the layer itself takes."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.calibrate.sites import SITES, moments, onward
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.model.device import run
from easyspec_jax.model.windows import chain_windows
from easyspec_jax.parallel.mesh import MeshShape
from tests.support.models import loader, save_model

TEXTS, TOKENS = 2, 40
LAYERS = {"smollm2": 0, "llama with biases": 1, "granite": 0, "olmo2": 1, "gemma3": 0, "qwen3": 1}


def _whole(layer, config, h):
    start = jnp.zeros((TEXTS,), jnp.int32)
    windows = chain_windows(start, TOKENS, TOKENS, config)
    return layer(h, layer.init_cache(TEXTS, TOKENS), windows)[0]


@pytest.mark.parametrize(("family", "index"), LAYERS.items())
def test_the_way_through_the_sites_is_the_layers(tmp_path, family, index):
    save_model(tmp_path, family, num_hidden_layers=index + 1)
    from_ = loader(open_checkpoint(tmp_path), MeshShape(1, 1))
    layer = from_.layer(index)
    h = np.random.default_rng(0).normal(size=(2, TEXTS, TOKENS, from_.config.hidden_size))
    arrays = list(h.astype(np.float32))
    expected = [np.asarray(run(from_, _whole, layer, [x], P())) for x in arrays]
    for site in SITES:
        specs = (P(),) * (2 * site.arrays_onward)
        found = run(from_, onward, (layer, layer), arrays, specs, site)
        arrays = [np.asarray(x) for x in found]
    for one, whole in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(one, whole, atol=1e-5)
    assert not np.allclose(*expected, atol=0.1)


def test_moments_are_sums_over_the_inputs(tmp_path):
    save_model(tmp_path, "smollm2", num_hidden_layers=1)
    from_ = loader(open_checkpoint(tmp_path), MeshShape(1, 1))
    layer, hidden = from_.layer(0), from_.config.hidden_size
    exact, rounded = np.random.default_rng(0).normal(size=(2, TEXTS, TOKENS, hidden))
    arrays = [exact.astype(np.float32), rounded.astype(np.float32)]
    hessian, cross = run(from_, moments, (layer, layer), arrays, (P(), P()), SITES[0])
    norm = from_.source.read("model.layers.0.input_layernorm.weight")

    def normed(h):
        h = h.reshape(-1, hidden)
        return h / np.sqrt(np.square(h).mean(axis=1, keepdims=True) + 1e-6) * norm

    x, y = normed(rounded), normed(exact)
    np.testing.assert_allclose(hessian, x.T @ x, atol=1e-2)
    np.testing.assert_allclose(cross, x.T @ y, atol=1e-2)
    # The last site's inputs are those of the down projection.
    (_, inner), matrix = np.asarray(layer.mlp.down.weight.shape), SITES[3]
    arrays = [np.ones((TEXTS, TOKENS, n), np.float32) for n in (hidden, inner, hidden, inner)]
    hessian, _ = run(from_, moments, (layer, layer), arrays, (P(), P()), matrix)
    np.testing.assert_array_equal(hessian, np.full((inner, inner), TEXTS * TOKENS))
