"""Models without weights: the engine's own modules, with shapes in place of arrays.

They answer how much memory a pair would take and what its programs would compute, for devices that
need not exist.
"""

import re
from collections.abc import Hashable, Mapping
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
from easyspec_jax.checkpoint.quantized import Integers, offset_name, scale_name, stored_integers
from easyspec_jax.checkpoint.tensors import Slices, TensorSource
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import State, init_state
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.draft.refit_file import refit_shapes
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.experts import Experts
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.shard_plan import ArrayPlan
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import MLP, Decoder
from easyspec_jax.options import KVDType, Platform, SamplingParams, Weights
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape
from easyspec_jax.parallel.platforms import PlatformSettings


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
    """A TensorSource of shapes. Whatever is read is one broadcast byte.

    Attributes:
        held: Shapes of the tensors without scales and offsets.
        integers: How those that are quantized are stored.
    """

    held: Mapping[str, tuple[int, ...]]
    integers: Integers = ()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = dict(self.held)
        for name, _, groups, has_offsets in self.integers:
            shapes[scale_name(name)] = self.held[name][0], groups
            if has_offsets:
                shapes[offset_name(name)] = shapes[scale_name(name)]
        return shapes

    def dtypes(self) -> Mapping[str, str]:
        # A loader converts floats of any type to its own.
        dtypes = dict.fromkeys(self.shapes(), "float32")
        for name, dtype, *_ in self.integers:
            dtypes[name] = dtype
        return dtypes

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        # A view with strides of 0 has the right shape and takes one byte.
        return np.broadcast_to(np.zeros((), np.bool_), self.shapes()[name])[window]


class ShapeLoader(Loader):
    """A Loader that places nothing. Layers that are stored alike have the same shapes."""

    def load(
        self, plan: ArrayPlan, dtype: np.dtype | None = None, source: TensorSource | None = None
    ) -> jax.Array:
        """Return the array's shape, type and sharding."""
        sharding = NamedSharding(self.mesh, plan.spec)
        dtype = dtype or self.dtype
        return jax.ShapeDtypeStruct(plan.shape, dtype, sharding=sharding)  # pyright: ignore[reportReturnType]

    def attention(self, index: int) -> Attention:
        """Return a layer's attention, the same object for all that are stored alike."""
        return self._like(index)[0]

    def mlp(self, index: int) -> MLP | Experts:
        """Return a layer's feed-forward part, the same object for all that are stored alike."""
        return self._like(index)[1]

    def _like(self, index: int) -> tuple[Attention, MLP | Experts]:
        # Shapes of one layer are enough: making 80 layers' would take seconds.
        mixture = self.config.mixture
        kind = self._stored[index], mixture is not None and index in mixture.dense_layers
        if kind not in self._made:
            self._made[kind] = super().attention(index), super().mlp(index)
        return self._made[kind]

    @cached_property
    def _made(self) -> dict[Hashable, tuple[Attention, MLP | Experts]]:
        return {}

    @cached_property
    def _stored(self) -> list[frozenset[tuple[str, str, int, bool]]]:
        """Names, types, scales of a row and offsets of the quantized matrices of each layer."""
        layers: list[set[tuple[str, str, int, bool]]] = []
        layers.extend(set() for _ in range(self.config.num_hidden_layers))
        for name, dtype, groups, has_offsets in stored_integers(self._kept):
            if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
                layers[int(found[1])].add((found[2], dtype, groups, has_offsets))
        return list(map(frozenset, layers))


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
    stored: tuple[Integers, Integers] = ((), ()),
    tokens: int | None = None,
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
        weights: Types of the target's and the draft's matrices; None for those that they are stored
            in if they are quantized, else `dtype`.
        kv_dtype: Type of the caches; "auto" is `dtype`.
        stored: How the target's and the draft's quantized matrices are stored.
        tokens: Tokens that a round verifies; see Loader.

    Returns:
        The modules, with a jax.ShapeDtypeStruct for every array.
    """

    def loader(
        config: ModelConfig, axes: Axes, kept: Weights | None, integers: Integers
    ) -> ShapeLoader:
        configs = [c for c in (target, draft) if c is not None]
        return ShapeLoader(
            source=Shapes(expected_shapes(config), integers),
            config=config,
            mesh=mesh,
            axes=axes,
            dtype=dtype,
            vocab_rows=padded_vocab_size(mesh, *configs),
            num_ids=config.vocab_size,
            settings=settings,
            weights=kept,
            kv_dtype=kv_dtype,
            tokens=tokens if config is target else None,
        )

    of_target = loader(target, ALL_AXES, weights[0], stored[0])
    layers = [of_target.layer(index) for index in range(target.num_hidden_layers)]
    of_draft = None
    if draft is not None:
        fitted = Shapes(refit_shapes(layout, expected_shapes(draft))) if refit else None
        of_draft = load_draft(loader(draft, draft_axes, weights[1], stored[1]), layout, fitted)
    return of_target.decoder(layers), of_draft


def abstract_state(programs: Programs, rows: int, capacity: int) -> State:
    """Return the state that programs would start with, of jax.ShapeDtypeStructs.

    Args:
        programs: The compiled steps; their models may be abstract.
        rows: Texts decoded together.
        capacity: Cache entries per row, in tokens.
    """
    # NumPy leaves zeros to the operating system until they are touched.
    request, adjustments = programs.row_arrays(SamplingParams(), [()] * rows)
    steps = programs.compiled
    limits = np.zeros(rows, np.int32)
    body = partial(init_state, capacity=capacity)
    request_spec, adjustments_spec = steps.row_specs
    specs = request_spec, P(), adjustments_spec, steps.corpus_spec
    # Traced, not run: the caches themselves are never allocated.
    state = jax.eval_shape(
        steps.mapped(body, specs, steps.state_spec),
        steps.leaves,
        request,
        limits,
        adjustments,
        programs.corpus,
    )

    def placed(spec: P, part: Any) -> Any:
        sharding = NamedSharding(programs.mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(placed, steps.state_spec, state)


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
