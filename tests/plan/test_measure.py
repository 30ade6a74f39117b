"""Measuring replaces every figure except the memory with a plausible one."""

from dataclasses import fields

import numpy as np
import pytest

from easyspec_jax.parallel.mesh import MeshShape, open_mesh
from easyspec_jax.plan import measure
from easyspec_jax.plan.machines import MACHINES


@pytest.mark.parametrize("devices", [1, 2])
def test_figures_are_measured(devices, monkeypatch):
    monkeypatch.setattr(measure, "SIDE", {"cpu": 256})
    monkeypatch.setattr(measure, "LARGE", 2**14)
    table = MACHINES["cpu"]
    found = measure.measured(table, open_mesh(MeshShape(1, devices), "cpu"), np.dtype(np.float32))
    assert (found.name, found.memory, found.origin) == (table.name, table.memory, "measured")
    for field in fields(found):
        value = getattr(found, field.name)
        if isinstance(value, float):
            assert np.isfinite(value) and value >= 0, field.name
    assert found.bandwidth not in (0, table.bandwidth)
    assert found.flops not in (0, table.flops)
    assert (found.latency == 0) == (devices == 1) or found.latency == 0
