"""A mesh comes from a few characters of text, or is refused in one line."""

from types import SimpleNamespace

import jax
import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Platform
from easyspec_jax.parallel.mesh import (
    ALL_AXES,
    LAYER,
    TENSOR,
    MeshShape,
    axes_size,
    open_mesh,
    parse_mesh,
)


@pytest.mark.parametrize(
    ("text", "group_size", "layer", "tensor"),
    [
        ("1", 1, 1, 1),
        ("1", 4, 1, 1),
        ("8", 1, 1, 8),
        ("8", 2, 2, 4),
        ("8", 3, 2, 4),
        ("8", 4, 4, 2),
        ("8", 7, 4, 2),
        ("8", 100, 8, 1),
        ("6", 4, 3, 2),
        ("7", 4, 1, 7),
        ("12", 5, 4, 3),
        ("layer=4,tensor=2", 1, 4, 2),
        ("tensor=2,layer=4", 7, 4, 2),
        ("layer=1,tensor=16", 4, 1, 16),
    ],
)
def test_a_number_is_split_by_group_size_and_names_set_the_split(text, group_size, layer, tensor):
    shape = parse_mesh(text, group_size)
    assert shape == MeshShape(layer, tensor)
    assert shape.size == layer * tensor


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "-1", "2.5", "²", "eight", "4x2", "4,2"),
        *(
            "layer=4",
            "layer=4,layer=2",
            "layer=0,tensor=2",
            "layer=-4,tensor=2",
            "layer=4,tensor=2,",
            "layer=4,head=2",
        ),
        *("layer=4,tensor=2,data=1", "layer=4;tensor=2", "layer=4,tensor=two", "layer=4 ,tensor=2"),
        *("-layer=4,tensor=2", "layer=4,or tensor=2", "layer=4,tensor=2\n", "1000000"),
    ],
)
def test_other_text_is_refused_in_one_line(text):
    with pytest.raises(EasySpecError, match="`mesh`") as refusal:
        parse_mesh(text)
    assert repr(text) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("layer", "tensor"), [(1, 1), (4, 2), (2, 4), (8, 1), (3, 1)])
def test_a_mesh_has_the_first_devices_row_by_row(layer, tensor):
    mesh = open_mesh(MeshShape(layer, tensor), "cpu")
    assert mesh.axis_names == ALL_AXES
    assert mesh.devices.shape == (layer, tensor)
    assert list(mesh.devices.flat) == jax.devices("cpu")[: layer * tensor]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    sizes = [axes_size(mesh, axes) for axes in ((), (LAYER,), (TENSOR,), ALL_AXES)]
    assert sizes == [1, layer, tensor, layer * tensor]


def test_too_few_devices_are_refused_even_when_asked_for_too_late():
    here = jax.device_count()
    for devices in (here + 1, 10**11):
        with pytest.raises(
            EasySpecError, match=rf"asks for {devices} devices but there are {here} of platform cpu"
        ):
            open_mesh(MeshShape(1, devices))


def test_a_mesh_that_may_fall_back_to_a_cpu_does_so_only_where_accelerators_are_too_few(
    monkeypatch,
):
    real = jax.devices
    one = [SimpleNamespace(platform="gpu")]
    monkeypatch.setattr(
        jax, "devices", lambda platform=None: one if platform in (None, "gpu") else real(platform)
    )
    assert list(open_mesh(MeshShape(4, 2), or_cpu=True).devices.flat) == real("cpu")[:8]
    cases: list[tuple[MeshShape, Platform | None, bool]] = [
        (MeshShape(4, 2), None, False),
        (MeshShape(4, 2), "gpu", True),
        (MeshShape(1, 10**4), None, True),
    ]
    for shape, platform, or_cpu in cases:
        with pytest.raises(EasySpecError, match="`mesh` asks for"):
            open_mesh(shape, platform, or_cpu)
    with pytest.raises(EasySpecError, match=r"use `mesh` 1 or `platform` cpu \(virtual devices\)"):
        open_mesh(MeshShape(4, 2))


def test_an_absent_platform_is_refused():
    with pytest.raises(EasySpecError, match="`platform` tpu: JAX finds no such device"):
        open_mesh(MeshShape(1, 1), "tpu")


def test_several_processes_have_equal_parts(monkeypatch):
    monkeypatch.setattr("easyspec_jax.parallel.hosts.count", lambda: 2)
    with pytest.raises(
        EasySpecError, match="asks for 3 devices, which 2 processes cannot share equally"
    ):
        open_mesh(MeshShape(3, 1))
