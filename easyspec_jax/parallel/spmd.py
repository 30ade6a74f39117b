"""One function of one device's shards, run on every device of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


def spmd(body: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Map a function of shards over a mesh; the result is to be jitted.

    `shard_map` could check that outputs which are declared replicated really are. It cannot prove
    that for what this package computes (every device draws the same noise, and repeats the same
    decisions), so the check is off, and tests compare the devices' values instead.

    Args:
        body: Called on each device with its shards; may call collectives over the mesh axes.
        mesh: The devices.
        in_specs: A PartitionSpec, or a pytree of them, for each argument.
        out_specs: The same for the results.
    """
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def partition_specs(tree: Any) -> Any:
    """Return the PartitionSpec of every array of a pytree, as spmd() takes them."""

    def spec(array: Any) -> PartitionSpec:
        return array.sharding.spec

    return jax.tree.map(spec, tree)
