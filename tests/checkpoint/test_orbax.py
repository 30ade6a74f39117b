"""Orbax checkpoints of any writer are listed by Orbax and read window by window."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert.orbax import OrbaxStore
from easyspec_jax.checkpoint.orbax import OrbaxSource
from easyspec_jax.errors import EasySpecError

# JAX refuses to change the number of devices once a backend has started.
OPEN_THEN_CHOOSE = """
import sys, jax
from pathlib import Path
from easyspec_jax.checkpoint.orbax import OrbaxSource
jax.config.update("jax_platforms", "cpu")
print(OrbaxSource(Path(sys.argv[1])).shapes())
jax.config.update("jax_num_cpu_devices", 3)
assert len(jax.devices()) == 3
"""


@pytest.mark.parametrize("use_zarr3", [False, True])
def test_checkpoints_that_orbax_wrote(tmp_path, use_zarr3):
    matrix = np.arange(15, dtype=np.float32).reshape(5, 3)
    tree = {"a": {"b": jnp.asarray(matrix), "c": [matrix.astype(jnp.bfloat16)]}, "step": 7}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=use_zarr3)) as checkpointer:
        checkpointer.save(tmp_path / "saved", args=ocp.args.PyTreeSave(tree))
    source = OrbaxSource(tmp_path / "saved")
    assert source.shapes() == {"a.b": (5, 3), "a.c.0": (5, 3), "step": ()}
    assert source.dtypes()["a.c.0"] == "bfloat16"
    window = (slice(1, 4), slice(0, 2))
    np.testing.assert_array_equal(source.read("a.b", window), matrix[window])
    np.testing.assert_array_equal(source.read("a.c.0"), matrix)


def test_opening_leaves_the_choice_of_devices_to_others(tmp_path):
    store = OrbaxStore(tmp_path, {"w": (4, 2)}, "float32")
    store.write("w", 0, np.ones((4, 2), np.float32))
    store.finish()
    command = [sys.executable, "-c", OPEN_THEN_CHOOSE, tmp_path / "weights"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout == "{'w': (4, 2)}\n"
    assert not printed.stderr


def test_leaves_of_other_types_are_one_line(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "saved", args=ocp.args.PyTreeSave({"name": "text"}))
    with pytest.raises(EasySpecError, match="is not a readable Orbax checkpoint") as error:
        OrbaxSource(tmp_path / "saved")
    assert "\n" not in str(error.value)


def test_lists_that_lie_are_one_line(tmp_path):
    (tmp_path / "_METADATA").write_text(json.dumps({"tree_metadata": [], "use_zarr3": True}))
    with pytest.raises(EasySpecError, match="is not a readable Orbax checkpoint"):
        OrbaxSource(tmp_path)
