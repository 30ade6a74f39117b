"""Quantized checkpoints of Hugging Face are opened, converted, or refused by name."""

import json
from functools import cache, partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.converting import ConvertConfig, convert
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.quantized import Dequantized
from easyspec_jax.checkpoint.quantized_files import METHODS, assembled
from easyspec_jax.checkpoint.stored_matrices import covering, fields
from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.errors import EasySpecError
from tests.checkpoint import test_awq, test_compressed_tensors, test_fp8, test_gptq
from tests.support.quantized_files import UP, words, write

MODELS = {
    "awq": (test_awq.model, test_awq.SETTINGS, ("int4",)),
    "compressed-tensors": (
        test_compressed_tensors.model,
        test_compressed_tensors.settings(),
        ("int4",),
    ),
    "gptq": (test_gptq.model, test_gptq.SETTINGS, ("int4",)),
    "gptq with zero points": (
        partial(test_gptq.model, symmetric=False),
        test_gptq.SETTINGS | {"sym": False},
        ("int4",),
    ),
    "compressed-tensors with zero points": (
        partial(test_compressed_tensors.model, symmetric=False),
        test_compressed_tensors.settings(symmetric=False),
        ("int4",),
    ),
}
EVERY = MODELS | {"fp8": (test_fp8.model, test_fp8.SETTINGS, ())}


@given(st.data())
def test_codes_of_a_window_are_a_part_of_all_codes(data):
    bits = data.draw(st.sampled_from([4, 8]))
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=40))
    start = data.draw(st.integers(0, len(codes)))
    window = slice(start, data.draw(st.integers(start, len(codes))))
    packed = words(np.array([codes]), bits)
    of_words, within = covering(window, 32 // bits)
    assert fields(packed[:, of_words], bits)[0, within].tolist() == codes[window]


@pytest.mark.parametrize("method", MODELS)
def test_it_is_converted_without_a_loss(tmp_path, method):
    make, settings, integers = MODELS[method]
    stored, exact = make()
    write(tmp_path / "hf", stored, settings)
    result = convert(tmp_path / "hf", tmp_path / "out", ConvertConfig(verify=True))
    opened = open_checkpoint(tmp_path / "out")
    assert result.integers == integers
    assert not result.errors
    assert result.parameters == sum(values.size for values in exact.values())
    # Of 16 bits in the tensors that are left, whose type names the whole.
    assert (result.dtype, opened.config.dtype) == ("float16", "float16")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert opened.fingerprint == open_checkpoint(tmp_path / "hf").fingerprint
    for name, values in exact.items():
        np.testing.assert_array_equal(Dequantized(opened.source).read(name), values, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "quark"}, "quark"),
        ({"quant_method": ["gptq"]}, "gptq"),
        ({"bits": 4}, "None"),
        ("int8", "int8"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path, settings, shown):
    message = f"quantization method .*{shown}.* is not supported; supported: {', '.join(METHODS)}"
    with pytest.raises(EasySpecError, match=message) as error:
        write(tmp_path, test_gptq.model()[0], settings)
    assert "\n" not in str(error.value)


def test_a_name_is_no_settings(tmp_path):
    with pytest.raises(EasySpecError, match="quantization_config must be an object, not only"):
        write(tmp_path, test_gptq.model()[0], "gptq")


def test_no_settings_are_no_quantization(tmp_path):
    with pytest.raises(EasySpecError, match=r"v_proj\.weight is missing"):
        write(tmp_path, test_gptq.model()[0], None)


@pytest.mark.parametrize("part", ["weight_scale", "weight_offset"])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_parts_that_do_not_belong_to_a_format_are_refused(tmp_path, method, part):
    make, settings, _ = MODELS[method]
    stored = make()[0] | {UP + part: np.ones((96, 2), np.float32)}
    with pytest.raises(
        EasySpecError, match=rf"up_proj\.{part} does not belong to its format; remove it"
    ):
        write(tmp_path, stored, settings)


def test_offsets_that_overflow_are_refused_when_reading(tmp_path):
    stored, _ = test_awq.model()
    scales = stored[UP + "scales"].astype(np.float32)
    scales[0, 3] = 3e38
    stored[UP + "scales"], stored[UP + "qzeros"] = scales, np.zeros((2, 12), np.int32)
    source = write(tmp_path, stored, test_awq.SETTINGS)
    source.read(UP + "weight_offset", (slice(4, 9),))
    with pytest.raises(EasySpecError, match=r"up_proj\.scales holds values that overflow; fetch"):
        source.read(UP + "weight_offset")


@pytest.mark.parametrize("method", MODELS)
def test_a_truncated_file_is_refused(tmp_path, method):
    make, settings, _ = MODELS[method]
    write(tmp_path, make()[0], settings)
    file = tmp_path / "model.safetensors"
    source = open_checkpoint(tmp_path).source
    file.write_bytes(file.read_bytes()[: -(1 << 15)])
    with pytest.raises(EasySpecError, match="truncated or damaged"):
        open_checkpoint(tmp_path)
    with pytest.raises(EasySpecError, match=r"cannot be read \(it ends too early\)"):
        for name in source.shapes():
            source.read(name)


def test_a_norm_of_integers_is_refused(tmp_path):
    stored, _ = test_gptq.model()
    stored["model.norm.weight"] = np.ones(64, np.int8)
    with pytest.raises(EasySpecError, match=r"model\.norm\.weight is stored as I8, which is not"):
        write(tmp_path, stored, test_gptq.SETTINGS)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = {
    "awq": ["bits", "group_size", "version"],
    "compressed-tensors": ["config_groups", "format", "sparsity_config", "transform_config"],
    "fp8": ["fmt", "weight_block_size"],
    "gptq": ["bits", "group_size", "sym", "checkpoint_format", "format", "dynamic"],
}
SCHEME = ["num_bits", "type", "symmetric", "block_structure"]
TYPES = {
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "float32": np.float32,
    "float16": np.float16,
}


class InMemory(Held):
    """Tensors in memory, whose types have the names that files give them."""

    def dtypes(self):
        names = {np.dtype(dtype): name for name, dtype in TYPES.items()}
        return {name: names[values.dtype] for name, values in self.tensors.items()}


def read_everything(stored, settings):
    """Open and read; only a message of ours may come out."""
    try:
        source = assembled(InMemory(stored), settings, frozenset(), "here")
        for name, shape in source.shapes().items():
            if source.dtypes()[name] in ("int4", "int8", "bfloat16", "float32"):
                assert source.read(name).shape == shape
    except EasySpecError as error:
        assert str(error).startswith("here: ")
        assert "\n" not in str(error)


@given(st.data())
def test_settings_of_any_kind_are_read_or_refused(data):
    method = data.draw(st.sampled_from(sorted(EVERY)))
    make, settings, _ = EVERY[method]
    format = settings["quant_method"]
    field, value = data.draw(st.sampled_from(FIELDS[format])), data.draw(JUNK)
    changed = settings | {field: value}
    if format == "compressed-tensors" and data.draw(st.booleans()):
        changed = test_compressed_tensors.settings(**{data.draw(st.sampled_from(SCHEME)): value})
    read_everything(cached(make)[0], changed)


@given(st.data())
def test_parts_of_any_shape_are_read_or_refused(data):
    method = data.draw(st.sampled_from(sorted(EVERY)))
    make, settings, _ = EVERY[method]
    stored = dict(cached(make)[0])
    for name in data.draw(st.sets(st.sampled_from(sorted(stored)), min_size=1, max_size=3)):
        shape = data.draw(st.lists(st.integers(0, 100), max_size=3))
        dtype = TYPES[data.draw(st.sampled_from(sorted(TYPES)))]
        number = data.draw(st.sampled_from([-9, -1, 0, 1, 7, 100]))
        stored[name] = np.full(shape, number).astype(dtype)
    read_everything(stored, settings)


@cache
def cached(make):
    return make()


def test_windows_read_their_own_bytes(tmp_path, monkeypatch):
    """Two rows of GPTQ are one word of every 8 columns, and their zero points and scales."""
    from easyspec_jax.checkpoint import safetensors

    stored, _ = test_gptq.model()
    source, counted = write(tmp_path, stored, test_gptq.SETTINGS), []
    read_bytes = safetensors.read_bytes

    def count(file, out, offset):
        counted.append(out.nbytes)
        read_bytes(file, out, offset)

    monkeypatch.setattr(safetensors, "read_bytes", count)
    source.read(UP + "weight", (slice(8, 10),))
    assert sum(counted) == 8 * 2 * 4 + 2 * 4
