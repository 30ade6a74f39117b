"""Models without weights: the engine's own modules, with shapes in place of arrays.

They answer how much memory a pair would take and what its programs would compute, for devices that
need not exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil, prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.arithmetic import packed_width
from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.tensors import Slices, TensorSource
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.round import State, init_state
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.draft.refit_file import refit_shapes
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.shard_plan import ArrayPlan
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import MLP, Decoder
from easyspec_jax.options import KVDType, Platform, Weights
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape
from easyspec_jax.parallel.platforms import PlatformSettings
from easyspec_jax.verify import RowSampling


@dataclass(frozen=True)
class AbsentDevice:
    """The least that a mesh needs to know of a device to trace programs that will never run."""

    id: int
    platform: Platform
    device_kind: str = "absent"
    process_index: int = 0


def absent_mesh(shape: MeshShape, platform: Platform) -> Mesh:
    """Return a mesh as open_mesh() would, of devices that need not exist."""
    devices = np.asarray([AbsentDevice(index, platform) for index in range(shape.size)], object)
    return Mesh(
        devices.reshape(shape.layer, shape.tensor),
        ALL_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )


@dataclass(frozen=True)
class Shapes:
    """A TensorSource of shapes. Whatever is read is one broadcast byte."""

    held: Mapping[str, tuple[int, ...]]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.held

    def dtypes(self) -> Mapping[str, str]:
        # Unused: a loader converts floats of any type to its own.
        return dict.fromkeys(self.held, "float32")

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        # A view with strides of 0 has the right shape and takes one byte.
        return np.broadcast_to(np.zeros((), np.bool_), self.held[name])[window]


class ShapeLoader(Loader):
    """A Loader that places nothing. All layers have the same shapes, so one stands for all."""

    def load(
        self, plan: ArrayPlan, dtype: np.dtype | None = None, source: TensorSource | None = None
    ) -> jax.Array:
        """Return the array's shape, type and sharding."""
        sharding = NamedSharding(self.mesh, plan.spec)
        dtype = dtype or self.dtype
        return jax.ShapeDtypeStruct(plan.shape, dtype, sharding=sharding)  # pyright: ignore[reportReturnType]

    @cached_property
    def _first(self) -> tuple[Attention, MLP]:
        # Shapes of one layer are enough: making 80 layers' would take seconds.
        return super().attention(0), super().mlp(0)

    def attention(self, index: int) -> Attention:
        """Return the attention of any layer."""
        return self._first[0]

    def mlp(self, index: int) -> MLP:
        """Return the feed-forward part of any layer."""
        return self._first[1]


def abstract_pair(
    target: ModelConfig,
    draft: ModelConfig | None,
    mesh: Mesh,
    layout: Layout,
    refit: bool,
    draft_axes: Axes,
    dtype: np.dtype,
    settings: PlatformSettings | None = None,
    weights: tuple[Weights | None, Weights | None] = (None, None),
    kv_dtype: KVDType = "auto",
) -> tuple[Decoder, Decoder | None]:
    """Return target and draft as the engine would load them.

    Args:
        target: The target's configuration.
        draft: The draft's, or None.
        mesh: The devices.
        layout: Which layers of the draft run at once.
        refit: Whether the draft has refitted projections as well as its own.
        draft_axes: Mesh axes that the dense parts of the draft are split over.
        dtype: Type to compute in.
        settings: Which kernels the modules use; None for those of the mesh's platform.
        weights: Types of the target's and the draft's matrices; None for `dtype`.
        kv_dtype: Type of the caches; "auto" is `dtype`.

    Returns:
        The modules, with a jax.ShapeDtypeStruct for every array.
    """

    def loader(config: ModelConfig, axes: Axes, kept: Weights | None) -> ShapeLoader:
        configs = [c for c in (target, draft) if c is not None]
        return ShapeLoader(
            Shapes(expected_shapes(config)),
            config,
            mesh,
            axes,
            dtype,
            vocab_rows=padded_vocab_size(mesh, *configs),
            num_ids=config.vocab_size,
            settings=settings,
            weights=kept,
            kv_dtype=kv_dtype,
        )

    of_target = loader(target, ALL_AXES, weights[0])
    layers = [of_target.layer(index) for index in range(target.num_hidden_layers)]
    of_draft = None
    if draft is not None:
        fitted = Shapes(refit_shapes(layout, expected_shapes(draft))) if refit else None
        of_draft = load_draft(loader(draft, draft_axes, weights[1]), layout, fitted)
    return of_target.decoder(layers), of_draft


def abstract_state(programs: Programs, rows: int, capacity: int) -> State:
    """Return the state that programs would start with, of jax.ShapeDtypeStructs.

    Args:
        programs: The compiled steps; their models may be abstract.
        rows: Texts decoded together.
        capacity: Cache entries per row, in tokens.
    """
    everywhere = NamedSharding(programs.mesh, P())
    # In the order of the fields: seed, round, temperature, top_k, top_p.
    types = (np.uint32, np.int32, np.float32, np.int32, np.float32)
    fields: list[Any] = [
        jax.ShapeDtypeStruct((rows,), dtype, sharding=everywhere) for dtype in types
    ]
    request = RowSampling(*fields)
    limits = jax.ShapeDtypeStruct((rows,), np.int32, sharding=everywhere)
    body = partial(init_state, capacity=capacity, size=programs.config.pending_size)
    # Traced, not run: the caches themselves are never allocated.
    state = jax.eval_shape(
        programs.mapped(body, (P(), P()), programs.state_spec), programs.leaves, request, limits
    )

    def placed(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(placed, programs._shardings[0], state)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes that a device holds of a pytree of arrays, or of sharded shapes."""
    return sum(map(bytes_of_shard, jax.tree.leaves(tree)))


def bytes_of_shard(array: Any) -> int:
    """Return the bytes of one shard of an array, or of a jax.ShapeDtypeStruct with a sharding."""
    platform = next(iter(array.sharding.device_set)).platform
    return bytes_of(prod(array.sharding.shard_shape(array.shape)), array.dtype, platform)


def bytes_of(size: int, dtype: np.dtype, platform: str) -> int:
    """Return the bytes that a number of elements take on a device.

    Accelerators pack two int4 elements into a byte; a CPU gives each a byte of its own.

    Examples:
        >>> bytes_of(6, np.dtype("int4"), "gpu"), bytes_of(6, np.dtype("int4"), "cpu")
        (3, 6)
    """
    return ceil(size * (dtype.itemsize if platform == "cpu" else packed_width(dtype)))
