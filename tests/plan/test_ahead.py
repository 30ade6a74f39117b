"""Compiled programs have the collectives of their traces and return the state they are given."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from easyspec_jax.checkpoint.config import model_config, read_json
from easyspec_jax.engine.abstract import abstract_state, bytes_per_device
from easyspec_jax.errors import EasySpecError
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.plan.ahead import Compiled, TooLarge, _memory_line, compile_round, topology_mesh
from easyspec_jax.plan.machines import MACHINES, Topology, parse_topology
from easyspec_jax.plan.steps import Pair, programs, ways

pytestmark = pytest.mark.slow

CPU = parse_topology("cpu:8")
MAX_LENGTH = 200


def pair(configs, tree_width: int = 1) -> Pair:
    target, draft = (model_config(read_json(configs[name])) for name in ("target", "draft"))
    return Pair(
        target,
        draft,
        np.dtype(np.float32),
        "8",
        3,
        tree_width,
        prompt_length=100,
        max_length=MAX_LENGTH,
    )


CHAINS, TREES = ways([4], 1), ways([2], 2)[-2:]


@pytest.mark.parametrize(
    "tree_width, way", [*((1, way) for way in CHAINS), *((2, way) for way in TREES)], ids=str
)
def test_the_state_is_donated_and_collectives_are_those_of_the_trace(configs, tree_width, way):
    run = programs(pair(configs, tree_width), way, lambda shape: topology_mesh(CPU, shape))
    state = abstract_state(run, 1, run.sizes.capacity(MAX_LENGTH))
    compiled = compile_round(run, MAX_LENGTH)
    assert isinstance(compiled, Compiled)
    assert compiled.collectives == compiled.traced_collectives
    caches = bytes_per_device((state.target, state.draft))
    assert compiled.donated >= caches
    assert compiled.arguments == bytes_per_device((run.target, run.draft, state))
    assert compiled.results - compiled.donated < caches / 10


def plan_in_a_process_of_its_own(
    configs, topology: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that has not started JAX and has no virtual devices."""
    command = [sys.executable, "-m", "easyspec_jax.plan", "--topology", topology]
    models = ["--target-config", str(configs["target"]), "--draft-config", str(configs["draft"])]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX", "TPU"))
    }
    return subprocess.run(
        [*command, *models, "--max-length", "400", *options],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_tpus_that_are_not_here(configs):
    pytest.importorskip("libtpu")
    done = plan_in_a_process_of_its_own(configs, "v5e:2x4", "--json")
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)["compiled"]
    assert compiled["fits"] is True
    # Newer compilers turn some small gathers into sums.
    found, traced = (compiled[name].values() for name in ("collectives", "traced_collectives"))
    assert sum(found) == sum(traced)
    assert compiled["donated"] > 0


def test_a_slice_that_does_not_exist(configs):
    pytest.importorskip("libtpu")
    done = plan_in_a_process_of_its_own(configs, "v5e:3x5")
    assert done.returncode == 2
    assert "--topology v5e:3x5: such a slice does not exist" in done.stderr


def test_gpus_that_are_not_here(configs):
    pytest.importorskip("jax_cuda12_plugin")
    done = plan_in_a_process_of_its_own(configs, "h100:8", "--json")
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)["compiled"]
    assert compiled["fits"] is True
    assert compiled["collectives"] == compiled["traced_collectives"]


def test_too_few_virtual_devices():
    with pytest.raises(EasySpecError, match="`mesh` asks for 300 devices"):
        topology_mesh(Topology("cpu:300", MACHINES["cpu"], 300), MeshShape(1, 300))


def test_what_xla_says_of_a_program_that_does_not_fit():
    page = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
        "Used 27.49G of 15.75G hbm. Exceeded\nby a lot"
    )
    assert TooLarge(_memory_line(page)).reason == "Used 27.49G of 15.75G hbm"
    assert _memory_line("RESOURCE_EXHAUSTED: no room\nat all") == "RESOURCE_EXHAUSTED: no room"
