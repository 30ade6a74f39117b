"""Load a pair onto a mesh, and see which device holds what of the draft.

    python examples/sharded_load.py                                        # the bundled pair
    python examples/sharded_load.py layer=4,tensor=2 ./target ./draft

Every device's shard is read straight from the file, by byte ranges: a tensor is whole in host
memory only if one device needs all of it. Where there are no accelerators, the bundled pair runs on
virtual devices of the CPU.
"""

import sys
from typing import Any

import jax

from easyspec_jax import SpeculativeConfig, open_model
from easyspec_jax.draft.grouping import format_layout
from easyspec_jax.parallel.mesh import parse_mesh


def main(
    mesh: str = "layer=2,tensor=2", target: str | None = None, draft: str | None = None
) -> None:
    # The attentions of a group of layers are spread over the axis "layer", one attention's heads
    # over "tensor". Everything else is split over both. "4" would leave the split to the engine.
    shape = parse_mesh(mesh)
    engine = open_model(target, draft, mesh=mesh, speculative=SpeculativeConfig(lp_size=2))
    print(f"{shape.size} devices; layers that run together: {format_layout(engine.layout)}")

    # Opening has compared the names and shapes of all tensors with the configuration. This reads
    # them, in their final layout and dtype.
    _, model = engine.load()

    # The first block is a single layer. The first group, block 2, has an axis of layers in front.
    for path, array in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.startswith(("blocks.0.", "blocks.2.")):
            print(f"{name:40} {array.shape!s:16} {array.sharding.spec}")

    for device in engine.mesh.devices.flat:
        print(f"{device} holds {held_bytes(model, device) / 2**20:.2f} MiB of the draft")


def held_bytes(model: Any, device: Any) -> int:
    """Count the bytes of a model's arrays on one device."""
    total = 0
    for array in jax.tree.leaves(model):
        for shard in array.addressable_shards:
            if shard.device == device:
                total += shard.data.nbytes
    return total


if __name__ == "__main__":
    main(*sys.argv[1:])
