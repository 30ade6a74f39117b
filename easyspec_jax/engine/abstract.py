"""Models without weights: the very modules that a checkpoint becomes, with shapes where arrays would be."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.tensors import Slices
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.round import State, init_state
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.draft.refit_file import refit_shapes
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.loader import Fill, Loader
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import MLP, Decoder
from easyspec_jax.options import Platform
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape
from easyspec_jax.verify import RowSampling


@dataclass(frozen=True)
class AbsentDevice:
    """Enough of a device for a mesh to trace programs on that will never run."""

    id: int
    platform: Platform
    device_kind: str = "absent"
    process_index: int = 0


def absent_mesh(shape: MeshShape, platform: Platform) -> Mesh:
    """As easyspec_jax.parallel.mesh.open_mesh, of devices that need not be there."""
    devices = np.asarray([AbsentDevice(index, platform) for index in range(shape.size)], object)
    return Mesh(
        devices.reshape(shape.layer, shape.tensor),
        ALL_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )


@dataclass(frozen=True)
class Shapes:
    """A TensorSource without tensors; one byte stands for all that is read."""

    held: Mapping[str, tuple[int, ...]]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.held

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        return np.broadcast_to(np.zeros((), np.bool_), self.held[name])[window]


class ShapeLoader(Loader):
    """A Loader that places nothing. A model's layers are alike, so the first stands for all."""

    def place_shards(self, shape: tuple[int, ...], spec: P, fill: Fill) -> jax.Array:
        """The array's shape, type and sharding."""
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=NamedSharding(self.mesh, spec))  # pyright: ignore[reportReturnType]

    @cached_property
    def _first(self) -> tuple[Attention, MLP]:
        return super().attention(0), super().mlp(0)

    def attention(self, index: int) -> Attention:
        """One layer's attention."""
        return self._first[0]

    def mlp(self, index: int) -> MLP:
        """A layer's feed-forward part."""
        return self._first[1]


def abstract_pair(
    target: ModelConfig,
    draft: ModelConfig | None,
    mesh: Mesh,
    layout: Layout,
    refit: bool,
    draft_axes: Axes,
    dtype: np.dtype,
) -> tuple[Decoder, Decoder | None]:
    """Target and draft as the engine would load them, with a jax.ShapeDtypeStruct for every array.

    refit: with the projections of a refit beside the draft's own.
    """

    def loader(config: ModelConfig, axes: Axes) -> ShapeLoader:
        configs = [c for c in (target, draft) if c is not None]
        rows = padded_vocab_size(mesh, *configs)
        return ShapeLoader(
            Shapes(expected_shapes(config)), config, mesh, axes, dtype, rows, config.vocab_size
        )  # pyright: ignore[reportArgumentType]

    of_target = loader(target, ALL_AXES)
    layers = [of_target.layer(index) for index in range(target.num_hidden_layers)]
    of_draft = None
    if draft is not None:
        fitted = Shapes(refit_shapes(layout, expected_shapes(draft))) if refit else None
        of_draft = load_draft(loader(draft, draft_axes), layout, fitted)
    return of_target.decoder(layers), of_draft


def abstract_state(programs: Programs, rows: int, capacity: int) -> State:
    """The state that `programs` would start with, with a jax.ShapeDtypeStruct for every array."""
    everywhere = NamedSharding(programs.mesh, P())
    types = (np.uint32, np.int32, np.float32, np.int32, np.float32)
    fields: list[Any] = [
        jax.ShapeDtypeStruct((rows,), dtype, sharding=everywhere) for dtype in types
    ]
    request = RowSampling(*fields)
    limits = jax.ShapeDtypeStruct((rows,), np.int32, sharding=everywhere)
    body = partial(init_state, capacity=capacity, size=programs.config.pending_size)
    state = jax.eval_shape(
        programs.mapped(body, (P(), P()), programs.state_spec), programs.leaves, request, limits
    )

    def placed(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(placed, programs._shardings[0], state)


def bytes_per_device(tree: Any) -> int:
    """Bytes per device of a pytree of arrays, or of jax.ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
