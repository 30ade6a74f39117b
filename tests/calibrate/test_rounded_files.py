"""Any rows and columns of a rounded matrix are read back."""

import ml_dtypes
import numpy as np

from easyspec_jax.calibrate.rounded_files import RoundedFiles, write_rounded


def test_windows_are_read_back(tmp_path):
    random = np.random.default_rng(0)
    values = random.integers(-8, 8, size=(10, 6)).astype(ml_dtypes.int4)
    scale = random.normal(size=(10, 2)).astype(np.float32)
    write_rounded(tmp_path, "a.weight", values, scale)
    names = ("a.weight", "a.weight_scale")
    files = RoundedFiles(dict.fromkeys(names, tmp_path), {names[0]: (10, 6), names[1]: (10, 2)})
    assert files.dtypes() == {"a.weight": "int4", "a.weight_scale": "float32"}
    for window in ((), (slice(3, 7),), (slice(0, 10), slice(1, 2)), (slice(4, 4),)):
        for name, whole in (("a.weight", values), ("a.weight_scale", scale)):
            found = files.read(name, window)
            assert found.dtype == whole.dtype
            np.testing.assert_array_equal(found, whole[window])
