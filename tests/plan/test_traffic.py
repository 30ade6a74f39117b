"""A trace has the collectives of the compiled program, as few as the method promises."""

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig, State
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.engine.abstract import abstract_pair, abstract_state
from easyspec_jax.model.transformer import Decoder, run_exact
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape, open_mesh
from easyspec_jax.plan.ahead import COLLECTIVE
from easyspec_jax.plan.traffic import collectives
from easyspec_jax.verify import Coupled, Greedy, Rejection
from tests.support.models import family_config

LAYERS = 8
GREEDY = RoundConfig(levels=3, calibration=True, verifier=Greedy(), stop_ids=())


def programs(
    mesh: MeshShape, lp_size: int, axes: Axes = ALL_AXES, config: RoundConfig = GREEDY
) -> Programs:
    """Make the programs of a tiny pair without weights."""
    shape = model_config(family_config("smollm2", num_hidden_layers=LAYERS).to_dict())
    opened, layout = open_mesh(mesh), Layout.uniform(paper_groups(LAYERS, lp_size))
    pair = abstract_pair(
        shape, shape if config.levels else None, opened, layout, False, axes, np.dtype(np.float32)
    )
    return Programs(opened, *pair, config)


def of_round(programs: Programs) -> list[Any]:
    arguments = (programs.leaves, abstract_state(programs, rows=1, capacity=128))
    return collectives(programs.compiled.round, *arguments, mesh_shape=programs.mesh.shape)  # pyright: ignore[reportArgumentType]


def in_compiled(text: str) -> Counter[str]:
    """Count collectives of a compiled program by kind, those in a loop as often as it runs."""
    bodies = {
        match[1]: match[2]
        for match in re.finditer(
            r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S
        )
    }

    def count(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in bodies[name].splitlines():
            found.update(COLLECTIVE.findall(line))
            if body := re.search(r"body=%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count[^}]*"n":"(\d+)"', line)
                assert trips, "a loop of unknown length"
                for kind, number in count(body[1]).items():
                    found[kind] += number * int(trips[1])
        return found

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    assert entry
    return count(entry[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, lp_size, axes, config",
    [
        (MeshShape(4, 2), 4, ALL_AXES, GREEDY),
        pytest.param(
            *(MeshShape(2, 2), 3, (), RoundConfig(3, True, Rejection(truncates=True), (), width=2)),
            marks=pytest.mark.exhaustive,
        ),
        (MeshShape(1, 4), 1, ALL_AXES, RoundConfig(2, False, Coupled(), (), width=3, nodes=4)),
        pytest.param(
            *(MeshShape(8, 1), 1, ALL_AXES, RoundConfig(0, False, Rejection(), ())),
            marks=pytest.mark.exhaustive,
        ),
        (MeshShape(1, 1), 4, ALL_AXES, GREEDY),
    ],
    ids=str,
)
def test_the_trace_counts_what_the_compiled_program_does(mesh, lp_size, axes, config):
    run = programs(mesh, lp_size, axes, config)
    jitted: Any = run.compiled.round  # declared as a mere callable
    compiled = jitted.lower(run.leaves, abstract_state(run, rows=1, capacity=128)).compile()
    counted = Counter(collective.kind for collective in of_round(run))
    assert counted == in_compiled(compiled.as_text())
    assert bool(counted) == (mesh.size > 1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshShape(4, 2), MeshShape(2, 4), MeshShape(1, 8)], ids=str)
@pytest.mark.parametrize("lp_size", [1, 2, 4, 7])
def test_a_fuzzy_step_costs_groups_plus_layers(mesh, lp_size):
    """A pass has an all-reduce for each group, each layer and the embedding.

    Single layers count as groups. With replicated MLPs only real groups need one.
    """

    def step(axes: Axes, run: Any) -> int:
        made = programs(mesh, lp_size, axes)

        def body(target: Decoder, draft: Decoder, state: State) -> jax.Array:
            return draft(state.pending(1), state.draft, state.length, run)[0]

        mapped = made.compiled.mapped(body, (made.compiled.state_spec,), P())
        arguments = (made.leaves, abstract_state(made, rows=1, capacity=128))
        return len(collectives(mapped, *arguments, mesh_shape=made.mesh.shape))  # pyright: ignore[reportArgumentType]

    groups = paper_groups(LAYERS, lp_size)
    grouped = [group for group in groups if len(group) > 1]
    assert step(ALL_AXES, run_fuzzy) == len(groups) + LAYERS + 1
    assert step(ALL_AXES, run_exact) == 2 * LAYERS + 1
    assert step((), run_fuzzy) == len(grouped)
    assert step((), run_exact) == sum(map(len, grouped))


def test_bytes_are_those_of_the_results():
    def body(x: jax.Array) -> jax.Array:
        y = jax.lax.psum(x, ALL_AXES)
        return jax.lax.scan(
            lambda carry, _: (carry + jax.lax.psum(carry, "layer"), None), y, None, length=3
        )[0]

    mesh = open_mesh(MeshShape(4, 1))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = collectives(mapped, jax.ShapeDtypeStruct((5, 6), np.float16), mesh_shape=mesh.shape)  # pyright: ignore[reportArgumentType]
    assert [(c.kind, c.bytes, c.devices) for c in found] == [("all-reduce", 60, 4)] * 4


def test_a_loop_of_unknown_length_is_refused():
    def body(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y[0] < 9, partial(jax.lax.psum, axis_name=ALL_AXES), x)

    mesh = open_mesh(MeshShape(4, 1))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match="unknown length"):
        collectives(mapped, jax.ShapeDtypeStruct((5,), np.int32), mesh_shape=mesh.shape)  # pyright: ignore[reportArgumentType]
