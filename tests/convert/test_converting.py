"""Conversion from Python, with a configuration in place of flags."""

import numpy as np
import pytest

import convert
from easyspec_jax import EasySpecError
from easyspec_jax.checkpoint.directory import open_checkpoint
from tests.support.models import save_model


def test_there_and_back(tmp_path):
    save_model(tmp_path / "hf", "smollm2")
    result = convert.convert(
        tmp_path / "hf", tmp_path / "orbax", convert.ConvertConfig(verify=True)
    )
    assert (tmp_path / "orbax" / "weights").is_dir()
    back = convert.ConvertConfig(format="huggingface", dtype="bfloat16")
    assert convert.convert(tmp_path / "orbax", tmp_path / "back", back).size * 2 == result.size
    written, source = (open_checkpoint(tmp_path / name).source for name in ("back", "hf"))
    for name in source.shapes():
        expected = source.read(name).astype(written.dtypes()[name])
        np.testing.assert_array_equal(written.read(name), expected)


def test_what_exists_is_only_verified(tmp_path):
    save_model(tmp_path / "hf", "smollm2")
    convert.convert(tmp_path / "hf", tmp_path / "out")
    config = convert.ConvertConfig(verify=True)
    assert convert.convert(tmp_path / "hf", tmp_path / "out", config).reused == 0
    with pytest.raises(EasySpecError, match="already exists"):
        convert.convert(tmp_path / "hf", tmp_path / "out")


def test_a_revision_is_of_a_model_on_the_hub(tmp_path):
    config = convert.ConvertConfig(revision="main")
    with pytest.raises(EasySpecError, match="`revision` needs a model on the hub"):
        convert.convert(tmp_path, tmp_path / "out", config)
