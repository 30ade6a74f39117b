"""A machine is what JAX and the host say."""

import sys

import jax
import pytest

from easyspec_jax import EasySpecError
from experiments.lib.machine import cores, host_memory, machine, torch_device


def test_a_machine_is_described():
    found = machine("cpu")
    assert found["devices"] == len(jax.devices("cpu"))
    assert (found["platform"], found["jax"], found["cores"]) == ("cpu", jax.__version__, cores())
    assert host_memory() > 2**27


def test_torch_is_named_where_it_is_missing(monkeypatch):
    pytest.importorskip("torch")
    assert torch_device("cpu") == "cpu"
    with pytest.raises(EasySpecError, match="cannot use the tpu"):
        torch_device("tpu")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EasySpecError, match=r"install \.\[test\], or leave out peers"):
        torch_device("cpu")
