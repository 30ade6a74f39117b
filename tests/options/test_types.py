"""The type to compute in is chosen by the devices and the checkpoint."""

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import resolve_dtype


def test_automatic_dtype_is_the_checkpoints_but_wide_on_a_cpu():
    assert resolve_dtype("auto", "gpu", "bfloat16") == "bfloat16"
    assert resolve_dtype("auto", "cpu", "bfloat16") == "float32"
    assert resolve_dtype("float16", "cpu", "bfloat16") == "float16"
    assert resolve_dtype("float32", "gpu", "int8") == "float32"
    with pytest.raises(EasySpecError, match="dtype 'int8' is not supported; give `dtype`"):
        resolve_dtype("auto", "gpu", "int8")
