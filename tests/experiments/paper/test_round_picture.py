"""The picture has the engine's steps, on the devices that hold the weights."""

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.parallel.mesh import MeshShape
from experiments.paper.round_picture import Kind, exact_pass, fuzzy_pass, main, owners
from tests.support.models import loader, save_model

MESHES = [MeshShape(1, 1), MeshShape(4, 1), MeshShape(4, 2), MeshShape(2, 4), MeshShape(3, 2)]
SIZES = [(1, 1), (2, 4), (12, 1), (12, 3), (12, 4), (12, 12)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("layers", "lp_size"), SIZES)
def test_a_layer_takes_two_steps_exactly_and_a_group_saves_all_attentions_but_one(
    layers, lp_size, mesh
):
    groups = paper_groups(layers, lp_size)
    exact, fuzzy = exact_pass(groups, mesh), fuzzy_pass(groups, mesh)
    assert len(exact) == 2 * layers
    assert len(fuzzy) == len(groups) + layers
    assert blocks(exact) == blocks(fuzzy), "both passes do the same work"


@pytest.mark.parametrize("run", [exact_pass, fuzzy_pass])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_no_device_does_two_things_at_once(run, mesh):
    for step in run(paper_groups(12, 4), mesh):
        busy = [device for block in step for device in block.devices]
        assert len(set(busy)) == len(busy)
        assert set(busy) <= set(range(mesh.size))


def test_a_fuzzy_pass_step_by_step():
    steps = fuzzy_pass((range(0, 1), range(1, 4)), MeshShape(4, 1))
    assert [
        [(block.kind.name, block.label, block.devices) for block in step] for step in steps
    ] == [
        [("ATTENTION", "0", range(4))],
        [("MLP", "0", range(4))],
        [("ATTENTION", str(layer), range(layer - 1, layer)) for layer in (1, 2, 3)],
        *([("MLP", str(layer), range(4))] for layer in (1, 2, 3)),
    ]


def test_a_device_that_holds_several_layers_attends_to_them_at_once():
    first = fuzzy_pass((range(4, 9),), MeshShape(2, 1))[0]
    assert [(block.label, block.devices) for block in first] == [
        ("4–6", range(1)),
        ("7–8", range(1, 2)),
    ]


@pytest.mark.parametrize("mesh", [MeshShape(4, 2), MeshShape(2, 4), MeshShape(3, 2)], ids=str)
def test_attentions_are_where_the_draft_has_them(mesh, tmp_path):
    save_model(tmp_path, "smollm2", num_hidden_layers=9)
    groups = paper_groups(9, 4)
    from_ = loader(open_checkpoint(tmp_path), mesh)
    devices = list(from_.mesh.devices.flat)
    loaded: Any = load_draft(from_, Layout.uniform(groups)).blocks
    for group, block in zip(groups, loaded, strict=True):
        norms = block.attention.qkv.norm.weight[...].addressable_shards
        for layer in group:
            norm = from_.source.read(f"model.layers.{layer}.input_layernorm.weight")
            holding = {
                devices.index(s.device)
                for s in norms
                if (np.atleast_2d(s.data) == norm).all(axis=1).any()
            }
            assert holding == set(owners(layer, group, mesh))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--lp-size", "0"], "--lp-size 0 must be from 1 to"),
        (["--layers", "1000"], "--layers 1000 must be from 1 to"),
        (["--devices", "-4"], "--devices -4 must be from 1 to"),
        (["--num-speculative-tokens", "0"], "--num-speculative-tokens 0 must be from 1 to"),
        (["--devices", "four"], "invalid int value: 'four'"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "round.svg")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("experiments.round_picture: error: ")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unusable_destination_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["--layers", "2", "--out", str(tmp_path / "absent" / "round.svg")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_same_picture_is_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    assert main(["--out", str(first)]) == main(["--out", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) < 150_000
    title = ElementTree.parse(first).findtext("{http://www.w3.org/2000/svg}title")
    assert (
        title is not None
        and "an exact pass of 24 sequential steps, each other by a fuzzy pass of 17" in title
    )


@pytest.mark.parametrize(
    "arguments", [("--layers", "1"), ("--devices", "1"), ("--num-speculative-tokens", "1")]
)
def test_the_smallest_pictures_can_be_drawn(arguments, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([*arguments, "--out", str(tmp_path / "round.svg")]) == 0


def blocks(steps) -> list[tuple[Kind, int, range]]:
    """Every layer's attention and MLP with its devices, in whatever order."""
    work = [
        (block.kind, layer, block.devices)
        for step in steps
        for block in step
        for layer in block.layers
    ]
    return sorted(work, key=lambda item: (item[0].name, item[1]))
