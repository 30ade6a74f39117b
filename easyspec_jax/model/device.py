"""Steps over hidden states on every device, compiled once for all blocks of one shape."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.model.loader import Loader
from easyspec_jax.parallel.spmd import spmd


def run(
    loader: Loader,
    step: Callable[..., Any],
    modules: Any,
    arrays: Sequence[np.ndarray],
    specs: Any,
    *static: Any,
) -> Any:
    """Call `step(modules, config, *arrays, *static)` on every device of a mesh.

    Args:
        loader: Loader that placed the modules; it has the mesh, the configuration and the dtype.
        step: The function. It is called under `shard_map`, so it may use collectives.
        modules: A tree of modules or arrays, each device seeing its own shards.
        arrays: Arrays that every device sees whole; floats are cast to the loader's dtype.
        specs: Partition specs of the results.
        static: Hashable arguments; other values compile another program.

    Returns:
        What `step` returns, as global arrays.
    """
    leaves, structure = jax.tree.flatten(modules)
    leaf_specs = tuple(leaf.sharding.spec for leaf in leaves)
    program = _program(
        step, static, loader.mesh, loader.config, structure, leaf_specs, len(arrays), specs
    )
    everywhere = NamedSharding(loader.mesh, P())
    placed = []
    for array in arrays:
        dtype = loader.dtype if array.dtype.kind == "f" else array.dtype
        placed.append(jax.device_put(array.astype(dtype), everywhere))
    return program(leaves, *placed)


@cache
def _program(
    step: Callable[..., Any],
    static: tuple[Any, ...],
    mesh: Mesh,
    config: ModelConfig,
    structure: Any,
    leaf_specs: tuple[P, ...],
    count: int,
    specs: Any,
) -> Callable[..., Any]:
    """Compile a step for all modules of one structure.

    The modules' leaves are arguments. If a step closed over them, every group of layers would
    compile a program of its own.
    """

    def body(leaves: tuple[jax.Array, ...], *arrays: Array) -> Any:
        with jax.default_matmul_precision("highest"):
            return step(jax.tree.unflatten(structure, leaves), config, *arrays, *static)

    # Parameters stay where the loader put them; every device has all of each array.
    in_specs = (list(leaf_specs), *(P(),) * count)
    return jax.jit(spmd(body, mesh, in_specs, specs))
