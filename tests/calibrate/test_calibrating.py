"""A calibrated model is nearer to the model as it was than one of the nearest integers."""

from dataclasses import replace

import numpy as np
import pytest

from easyspec_jax.calibrate import calibrating
from easyspec_jax.calibrate.calibrating import calibrate
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.quantized import Dequantized, Quantized
from easyspec_jax.checkpoint.tensors import Held, Overlay
from easyspec_jax.errors import EasySpecError
from easyspec_jax.parallel.mesh import MeshShape
from tests.support.models import forward, load_target, loader, save_model

LAYERS = 3


def _texts(seed: int, count: int):
    """Draw texts in which most ids are few."""
    ids = np.random.default_rng(seed).zipf(1.3, size=(count, 64)) % 300
    return ids.astype(np.int32)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "smollm2", num_hidden_layers=LAYERS)
    return open_checkpoint(directory)


@pytest.fixture(scope="module")
def found(opened, tmp_path_factory):
    directory = tmp_path_factory.mktemp("rounded") / "new"
    return calibrate(opened.source, opened.config, _texts(0, 30), 32, directory)


def test_logits_are_nearer(opened, found):
    nearest, read = Quantized(opened.source, "int4", 32), _texts(1, 4)

    def logits(source):
        from_ = loader(replace(opened, source=source), MeshShape(1, 1))
        return forward(load_target(from_), from_.mesh, read)[..., :300]

    exact = logits(opened.source)
    plain, calibrated = (
        np.linalg.norm(logits(source) - exact) for source in (nearest, Overlay(nearest, found))
    )
    assert calibrated < 0.75 * plain


def test_everything_is_as_it_would_be_rounded_without(opened, found):
    nearest = Quantized(opened.source, "int4", 32)
    both = Overlay(nearest, found)
    assert both.shapes() == nearest.shapes() and both.dtypes() == nearest.dtypes()
    assert sum(name.endswith(".weight") for name in found.shapes()) == 7 * LAYERS
    for name, shape in found.shapes().items():
        assert found.read(name).shape == shape


def test_an_interrupted_call_continues_after_the_last_whole_layer(
    opened, found, tmp_path, monkeypatch
):
    arguments = opened.source, opened.config, _texts(0, 30), 32, tmp_path / "new"
    plain, seen = calibrating.gptq, []

    def interrupted(weight, hessian, group):
        if len(seen) == 10:  # in the second layer
            raise KeyboardInterrupt
        seen.append(weight.shape)
        return plain(weight, hessian, group)

    monkeypatch.setattr(calibrating, "gptq", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(*arguments)
    seen[:] = seen[:3]
    monkeypatch.setattr(calibrating, "gptq", lambda *given: seen.append(given) or plain(*given))
    again = calibrate(*arguments)
    assert len(seen) == 3 + 7 * (LAYERS - 1), "the first layer is not rounded again"
    assert again.shapes() == found.shapes()
    for name in found.shapes():
        np.testing.assert_array_equal(again.read(name), found.read(name), err_msg=name)


def test_matrices_that_are_int4_already_stay(opened, found, tmp_path):
    nearest = Quantized(opened.source, "int4", 32)
    kept = {name for name in nearest.shapes() if "layers.1.mlp" in name}

    class Mixed:
        """A model with a layer whose MLP is stored as int4."""

        def shapes(self):
            return {**opened.source.shapes(), **{name: nearest.shapes()[name] for name in kept}}

        def dtypes(self):
            return {**opened.source.dtypes(), **{name: nearest.dtypes()[name] for name in kept}}

        def read(self, name, window=()):
            return (nearest if name in kept else opened.source).read(name, window)

    again = calibrate(Mixed(), opened.config, _texts(0, 30), 32, tmp_path / "new")
    assert again.shapes().keys() == found.shapes().keys() - kept
    name = "model.layers.2.mlp.up_proj.weight"
    assert Dequantized(Overlay(nearest, again)).read(name).shape == found.shapes()[name]


def test_numbers_that_are_not_finite_are_refused(opened, tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    damaged = opened.source.read(name).copy()
    damaged[3, 4] = np.nan
    source = Overlay(opened.source, Held({name: damaged}))
    with pytest.raises(EasySpecError, match=f"{name} or its inputs have values that are not"):
        calibrate(source, opened.config, _texts(0, 30), 32, tmp_path / "new")
