"""Checkpoints of int8 and int4 matrices are written, opened and written again without a loss."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from convert.converting import ConvertConfig, convert
from convert.huggingface import open_huggingface
from convert.shards import HUGGING_FACE
from convert.stream import convert as convert_model
from convert.stream import verify
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import EMBEDDING
from easyspec_jax.checkpoint.quantized import Dequantized, Quantized, is_matrix, scale_name
from easyspec_jax.errors import EasySpecError
from tests.support.models import FAMILIES, save_model


def assert_same(found, expected):
    assert found.shapes() == expected.shapes()
    assert found.dtypes() == expected.dtypes()
    for name in expected.shapes():
        np.testing.assert_array_equal(found.read(name), expected.read(name), err_msg=name)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_converted_model_is_the_one_that_is_quantized_while_it_is_read(tmp_path, family, weights):
    save_model(tmp_path / "hf", family, intermediate_size=64)
    model = open_huggingface(tmp_path / "hf")
    result = convert_model(model, tmp_path / "out", "float32", weights=weights, verify=True)
    expected = Quantized(model.source, weights)
    opened = open_checkpoint(tmp_path / "out")
    assert_same(opened.source, expected)
    assert result.parameters == sum(np.prod(shape) for shape in model.source.shapes().values())
    # With int4 the embedding is int8.
    assert result.integers == (("int8",) if weights == "int8" else ("int4", "int8"))
    matrices = {name for name, shape in model.source.shapes().items() if is_matrix(name, shape)}
    assert result.errors.keys() == matrices
    name = max(name for name in matrices if name.endswith("down_proj.weight"))
    exact = model.source.read(name)
    lost = np.linalg.norm(Dequantized(expected).read(name) - exact) / np.linalg.norm(exact)
    assert result.errors[name] == pytest.approx(lost, rel=1e-4)
    stored = sum(path.stat().st_size for path in (tmp_path / "out/weights").rglob("d/*"))
    assert result.size < 1.05 * stored


def test_int4_takes_half_a_byte(tmp_path):
    save_model(tmp_path / "hf", "llama3", hidden_size=256, intermediate_size=1024)
    results = {
        weights: convert(tmp_path / "hf", tmp_path / weights, ConvertConfig(weights=weights))
        for weights in ("int8", "int4")
    }
    sizes = {
        weights: sum(path.stat().st_size for path in (tmp_path / weights).rglob("d/*"))
        for weights in results
    }
    assert sizes["int4"] / sizes["int8"] == pytest.approx(
        results["int4"].size / results["int8"].size, rel=0.05
    )
    assert sizes["int4"] < 0.65 * sizes["int8"]  # the embedding stays int8


@pytest.fixture
def int4(tmp_path):
    save_model(tmp_path / "hf", "qwen2", intermediate_size=64)
    convert(tmp_path / "hf", tmp_path / "int4", ConvertConfig(weights="int4"))
    return tmp_path / "int4"


@pytest.mark.parametrize("weights", [None, "int4"])
def test_what_is_quantized_stays_as_it_is(int4, tmp_path, weights):
    result = convert(int4, tmp_path / "again", ConvertConfig(weights=weights, verify=True))
    assert_same(open_checkpoint(tmp_path / "again").source, open_checkpoint(int4).source)
    assert not result.errors
    assert open_checkpoint(int4).fingerprint == open_checkpoint(tmp_path / "again").fingerprint
    assert result.dtype == "float32"  # the embedding is int8, and config.json names the rest


def test_int4_is_not_widened(int4, tmp_path):
    message = "matrices are stored as int4, and `weights` int8 would only take more memory; leave"
    for out in ("again", "int4"):  # to write, and only to verify
        with pytest.raises(EasySpecError, match=message):
            convert(int4, tmp_path / out, ConvertConfig(weights="int8", verify=True))


def test_int8_is_rounded_further_to_int4(tmp_path):
    save_model(tmp_path / "hf", "llama3", intermediate_size=64)
    convert(tmp_path / "hf", tmp_path / "int8", ConvertConfig(weights="int8"))
    config = ConvertConfig(weights="int4", verify=True)
    result = convert(tmp_path / "int8", tmp_path / "int4", config)
    int8 = open_checkpoint(tmp_path / "int8").source
    opened = open_checkpoint(tmp_path / "int4").source
    assert_same(opened, Quantized(int8, "int4"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert opened.dtypes()[name] == "int4" and opened.dtypes()[EMBEDDING] == "int8"
    np.testing.assert_array_equal(opened.read(EMBEDDING), int8.read(EMBEDDING))
    # The error is measured against the numbers that the integers stood for.
    assert EMBEDDING not in result.errors
    exact, found = Dequantized(int8).read(name), Dequantized(opened).read(name)
    lost = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert result.errors[name] == pytest.approx(lost, rel=1e-4)


def test_bfloat16_makes_floats_of_it(int4, tmp_path):
    convert(int4, tmp_path / "floats", ConvertConfig(weights="bfloat16", verify=True))
    expected, found = (
        Dequantized(open_checkpoint(int4).source),
        open_checkpoint(tmp_path / "floats"),
    )
    assert found.source.shapes() == expected.shapes()
    for name, shape in expected.shapes().items():
        exact = expected.read(name)
        exact = exact.astype(ml_dtypes.bfloat16) if is_matrix(name, shape) else exact
        np.testing.assert_array_equal(found.source.read(name), exact, err_msg=name)


def test_an_export_holds_floats(int4, tmp_path):
    config = ConvertConfig(format="huggingface", verify=True)
    for _ in range(2):  # the second time it is only verified
        convert(int4, tmp_path / "hf2", config)
    expected, found = Dequantized(open_checkpoint(int4).source), open_checkpoint(tmp_path / "hf2")
    assert_same(found.source, expected)
    model = open_huggingface(tmp_path / "hf")
    for weights in ("int8", "int4", "bfloat16"):
        refused = f"`weights` {weights} is for Orbax checkpoints; a Hugging Face directory holds"
        with pytest.raises(EasySpecError, match=refused):
            convert_model(model, tmp_path / "x", format=HUGGING_FACE, weights=weights)
        with pytest.raises(EasySpecError, match=refused):
            verify(model, tmp_path / "hf2", weights=weights)


def test_an_interrupted_run_goes_on_and_measures_everything(tmp_path):
    save_model(tmp_path / "hf", "llama3", intermediate_size=64)
    model = open_huggingface(tmp_path / "hf")
    whole = convert_model(model, tmp_path / "whole", weights="int4")

    class Interrupted:
        """Fails at the last tensor."""

        def shapes(self):
            return model.source.shapes()

        def dtypes(self):
            return model.source.dtypes()

        def read(self, name, window=()):
            if name == "model.layers.5.mlp.down_proj.weight":
                raise KeyboardInterrupt
            return model.source.read(name, window)

    with pytest.raises(KeyboardInterrupt):
        convert_model(replace(model, source=Interrupted()), tmp_path / "out", weights="int4")
    result = convert_model(model, tmp_path / "out", weights="int4")
    assert result.reused > 0
    assert result.errors == whole.errors
    assert_same(
        open_checkpoint(tmp_path / "out").source, open_checkpoint(tmp_path / "whole").source
    )


def test_verifying_compares_integers_and_scales(int4, tmp_path):
    model = open_huggingface(tmp_path / "hf")
    assert verify(model, int4, weights="int4").integers == ("int4", "int8")
    for other in ("int8", None):
        with pytest.raises(EasySpecError, match="differs from"):
            verify(model, int4, weights=other)


def test_a_copied_head_is_no_head_of_its_own(int4):
    """The head that a tied model stores as well is compared by the numbers it stands for."""
    opened = open_checkpoint(int4)
    assert opened.config.tie_word_embeddings
    assert "lm_head.weight" not in opened.source.shapes()
    assert scale_name(EMBEDDING) in opened.source.shapes()
    assert "weights" not in json.loads((int4 / "config.json").read_text())
