"""A group of layers on the layer axis: exactly, in order; or fuzzily, at once (EasySpec, arXiv 2502.02493)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from easyspec_jax.draft.grouping import Group, slots_per_device
from easyspec_jax.mesh import ALL_AXES, LAYER, TENSOR, Axes
from easyspec_jax.model.attention import Attention, Window
from easyspec_jax.model.cache import KVCache
from easyspec_jax.model.collectives import all_reduce
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.transformer import MLP, Block, Decoder, Hidden, run_exact


class LayerGroup(nnx.Module):
    """Consecutive layers whose attentions live on different devices of the layer axis.

    Layer i's attention is slot i; each device holds `slots` consecutive slots and their KV. MLPs are split over `axes`:
    all devices, or none (replicated). branch: in the exact pass, devices that do not own the current slot skip its
    attention (virtual CPU devices share cores) instead of computing what is then masked out (on a GPU the branch would
    wait for the host).
    """

    def __init__(self, attention: Attention, mlps: Sequence[MLP], *, slots: int, axes: Axes, branch: bool) -> None:
        self.attention, self.mlps = attention, nnx.List(mlps)
        self.slots, self.axes, self.branch = slots, axes, branch

    def fuzzy(self, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
        """All attentions at once on the group's input, then the MLPs in order (the paper's Algorithm 2).

        One all-reduce brings the first attention output; output i + 1 rides along in the all-reduce of MLP i. With
        replicated MLPs all outputs come in the first one. Collectives: layers + 1, or 1.
        """
        parts, cache = jax.vmap(lambda attention, slot: attention(h, slot, window))(self.attention, cache)
        outputs = [self._addend(parts, layer) for layer in range(len(self.mlps))]
        if self.axes:
            outputs[0] = all_reduce(outputs[0], ALL_AXES)
        else:
            outputs = list(all_reduce(jnp.stack(outputs), ALL_AXES))
        h = h + outputs[0]
        for mlp, output in zip(self.mlps, [*outputs[1:], jnp.zeros_like(h)], strict=True):
            h = h + all_reduce(mlp(h) + output, self.axes)
        return h, cache

    def __call__(self, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
        """The layers in order, as the model defines them; as many all-reduces as tensor parallelism has."""
        for layer, mlp in enumerate(self.mlps):
            attended, cache = self._attend_in_turn(layer, h, cache, window)
            h = h + all_reduce(attended, ALL_AXES)
            h = h + all_reduce(mlp(h), self.axes)
        return h, cache

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """This device's part of an empty cache, slots in front."""
        one = self.attention.init_cache(batch, capacity)
        return jax.tree.map(lambda x: jnp.repeat(x[None], self.slots, axis=0), one)

    def cache_spec(self) -> KVCache:
        """A layer's KV lives where its attention does."""
        spec = P(LAYER, TENSOR, None, None)
        return KVCache(spec, spec)  # pyright: ignore[reportArgumentType]

    def _addend(self, parts: Float[Array, "slots batch tokens hidden"], layer: int) -> Hidden:
        """This device's addend of one layer's attention output: zero unless the layer is its own."""
        owner, slot = divmod(layer, self.slots)
        return jnp.where(jax.lax.axis_index(LAYER) == owner, parts[slot], jnp.zeros_like(parts[slot]))

    def _attend_in_turn(self, layer: int, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
        owner, slot = divmod(layer, self.slots)
        attention = jax.tree.map(lambda w: w[slot], self.attention)
        if jax.lax.axis_size(LAYER) == 1:
            return attention(h, cache, window, slot)
        mine = jax.lax.axis_index(LAYER) == owner
        if self.branch:
            return jax.lax.cond(mine, lambda c: attention(h, c, window, slot), lambda c: (jnp.zeros_like(h), c), cache)
        attended, cache = attention(h, cache, window, slot, where=mine)
        return jnp.where(mine, attended, jnp.zeros_like(attended)), cache


def run_fuzzy(block: Block, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
    """The fuzzy pass through one block: groups at once, single layers exactly."""
    return block.fuzzy(h, cache, window) if isinstance(block, LayerGroup) else run_exact(block, h, cache, window)


def load_draft(loader: Loader, groups: Sequence[Group]) -> Decoder:
    """A draft whose groups of two and more layers are layer-parallel over the loader's mesh."""
    blocks: list[Block] = [
        loader.layer(group.start) if len(group) == 1 else _load_group(loader, group) for group in groups
    ]
    return loader.decoder(blocks)


def _load_group(loader: Loader, group: Group) -> LayerGroup:
    layer_axis = loader.mesh.shape[LAYER]
    slots = slots_per_device(group, layer_axis)
    return LayerGroup(
        loader.stacked_attention(group, slots=slots * layer_axis),
        [loader.mlp(index) for index in group],
        slots=slots,
        axes=loader.axes,
        branch=loader.mesh.devices.flat[0].platform == "cpu",
    )
