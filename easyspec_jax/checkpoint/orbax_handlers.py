"""Type handlers with which Orbax opens and commits checkpoints without a tensor in memory.

Importing this module imports Orbax and JAX, so import it where it is used. docs/checkpoints.md has
the reasons and the figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers


def open_tensors(directory: Path, *, zeros_are_stored: bool) -> dict[str, ts.TensorStore]:
    """Open every tensor that an Orbax checkpoint lists, without reading any.

    Orbax's restore would read whole tensors, and start JAX's backend before the mesh is chosen. Its
    metadata call does neither. It asks a type handler about each tensor, and ours answers with the
    open tensor.

    Args:
        directory: The Orbax checkpoint.
        zeros_are_stored: Whether zeros were stored too, so that a missing chunk is damage.

    Returns:
        Open zarr arrays by name; levels of a nested tree are joined by dots.
    """
    # Annotated as Any, because Orbax asks for its own type of path, though it takes any.
    opener: Any = _checkpoint_handler(
        (np.ndarray, _Opening("np.ndarray", zeros_are_stored)),
        (jax.Array, _Opening("jax.Array", zeros_are_stored)),
        (int, _Opening("scalar", zeros_are_stored)),
    )
    leaves = jax.tree.leaves(opener.metadata(directory.resolve()).tree)
    return {leaf.name: leaf.array for leaf in leaves if isinstance(leaf, _OpenTensor)}


def commit(
    directory: Path, pieces: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]
) -> None:
    """Make a store of finished tensors an Orbax checkpoint.

    Orbax writes its metadata, lists the store in an index at the top and marks the checkpoint as
    complete. The store is moved, not copied.

    Args:
        directory: The Orbax checkpoint to create.
        pieces: An OCDBT store with a zarr array for each name, called as Orbax calls the store of a
            process (`ocdbt.process_0`); it becomes a part of the checkpoint.
        tensors: The shape and the type of every tensor, by name.
    """
    handler = _checkpoint_handler(
        (jax.ShapeDtypeStruct, _Moving(pieces)), (jax.Array, type_handlers.ArrayHandler())
    )
    tree = {name: jax.ShapeDtypeStruct(*tensor) for name, tensor in tensors.items()}
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.resolve(), args=ocp.args.PyTreeSave(tree))


def _checkpoint_handler(
    *handlers: tuple[type, type_handlers.TypeHandler],
) -> ocp.PyTreeCheckpointHandler:
    registry = type_handlers.create_type_handler_registry(*handlers)
    # By default Orbax asks JAX for its platform here, which would start the backend.
    return ocp.PyTreeCheckpointHandler(
        use_zarr3=True, type_handler_registry=registry, enable_pinned_host_transfer=False
    )


@dataclass
class _OpenTensor(ocp.metadata.value.ArrayMetadata):
    """Orbax's metadata of a tensor, together with the tensor."""

    array: Any = None


class _Opening(type_handlers.ArrayHandler):
    """Answer a question for metadata with open tensors."""

    def __init__(self, typestr: str, zeros_are_stored: bool) -> None:
        super().__init__(array_metadata_store=None)
        self._typestr, self._zeros_are_stored = typestr, zeros_are_stored

    def typestr(self) -> str:
        return self._typestr

    async def metadata(self, infos: Sequence[type_handlers.ParamInfo]) -> Sequence[_OpenTensor]:
        opening = [self._open(info) for info in infos]
        # Wait without awaiting. If a tensor is damaged, Orbax closes its event loop at once, and
        # every other tensor that reports to the loop then prints a stack trace.
        arrays = [future.result() for future in opening]
        return [
            _OpenTensor(
                name=info.name,
                directory=info.parent_dir,
                shape=tuple(array.shape),
                dtype=array.dtype.numpy_dtype,
                sharding=None,
                array=array,
            )
            for info, array in zip(infos, arrays, strict=True)
        ]

    def _open(self, info: type_handlers.ParamInfo) -> Any:
        store = {"driver": "ocdbt", "base": Path(info.parent_dir).as_uri() + "/"}
        spec: dict[str, Any] = {
            "driver": "zarr3" if info.use_zarr3 else "zarr",
            "kvstore": store | {"path": f"{info.name}/"},
        }
        if self._zeros_are_stored:
            spec["fill_missing_data_reads"] = False
        return ts.open(spec, open=True)


class _Moving(type_handlers.NumpyHandler):
    """Save finished tensors by moving the store that holds them into the checkpoint.

    Each leaf of the tree is the shape and type of one tensor. Orbax lists them as NumPy arrays, so
    that it restores them without any handler of ours.
    """

    def __init__(self, pieces: Path) -> None:
        super().__init__()
        self._pieces = pieces

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        self._pieces.rename(Path(infos[0].parent_dir) / self._pieces.name)
        return []
