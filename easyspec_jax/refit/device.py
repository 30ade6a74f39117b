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


def run(loader: Loader, step: Callable[..., Any], modules: Any, arrays: Sequence[np.ndarray], specs: Any,
         *static: Any) -> Any:  # fmt: skip
    """step(modules, config, *arrays, *static) on every device; specs: of the results."""
    leaves, structure = jax.tree.flatten(modules)
    leaf_specs = tuple(leaf.sharding.spec for leaf in leaves)
    program = _program(
        step, static, loader.mesh, loader.config, structure, leaf_specs, len(arrays), specs
    )
    dtypes = (loader.dtype if array.dtype.kind == "f" else array.dtype for array in arrays)
    everywhere = NamedSharding(loader.mesh, P())
    placed = [
        jax.device_put(x.astype(dtype), everywhere) for x, dtype in zip(arrays, dtypes, strict=True)
    ]
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
    """Compiled once for all groups of one shape."""

    def body(leaves: tuple[jax.Array, ...], *arrays: Array) -> Any:
        with jax.default_matmul_precision("highest"):
            return step(jax.tree.unflatten(structure, leaves), config, *arrays, *static)

    in_specs = (list(leaf_specs), *(P(),) * count)
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=specs, check_vma=False)
    )
