"""A topology names a machine and a number of devices; errors list the machines there are."""

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.plan.machines import CHIPS, MACHINES, parse_topology, target_config


@pytest.mark.parametrize(
    "text, machine, devices",
    [
        ("v5e:2x4", "v5e", 8),
        ("V5P:2x2x4", "v5p", 16),
        ("v6e:4x4", "v6e", 16),
        ("h100:8", "h100", 8),
    ],
)
def test_topologies(text, machine, devices):
    topology = parse_topology(text)
    assert (topology.machine, topology.devices) == (MACHINES[machine], devices)
    assert topology.name == text.lower()


@pytest.mark.parametrize(
    "text, message",
    [
        ("v7:2x4", "`topology` 'v7:2x4': no machine 'v7'; there are v5e, v5p"),
        ("v5e", "how many devices; for example v5e:2x4"),
        ("v5e:", "how many devices"),
        ("v5e:2x0", "how many devices"),
        ("v5e:8", "the 2 sides of the torus of v5e, such as v5e:2x4"),
        ("v5p:2x4", "the 3 sides of the torus of v5p, such as v5p:2x2x2"),
        ("h100:2x4", "the number of h100, such as h100:8"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(EasySpecError, match=message):
        parse_topology(text)


def test_virtual_devices_share_their_host():
    shared, whole = parse_topology("cpu:8").machine, MACHINES["cpu"]
    assert (shared.bandwidth * 8, shared.flops * 8) == (whole.bandwidth, whole.flops)
    assert shared.latency == whole.latency


def test_every_gpu_can_be_described_to_xla():
    gpus = {name for name, machine in MACHINES.items() if machine.platform == "gpu"}
    assert set(CHIPS) == gpus
    for name in gpus:
        text = target_config(MACHINES[name])
        assert f"device_memory_size: {MACHINES[name].memory}" in text
        assert text.count("{") == text.count("}") == 3
