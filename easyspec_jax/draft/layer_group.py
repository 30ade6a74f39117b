"""A group of layers on the layer axis: exactly, in order; or fuzzily, at once (EasySpec, arXiv 2502.02493)."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from easyspec_jax.checkpoint.tensors import Overlay, TensorSource
from easyspec_jax.draft.grouping import Group, Layout, slots_per_device
from easyspec_jax.model.attention import Attention, Window
from easyspec_jax.model.cache import KVCache
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.transformer import MLP, Block, Decoder, Hidden, run_exact
from easyspec_jax.parallel.collectives import all_reduce
from easyspec_jax.parallel.mesh import ALL_AXES, LAYER, TENSOR, Axes


class Refit(nnx.Module):
    """Projections that stand in for a group's own in fuzzy passes, fitted to the inputs they have there.

    qkv: of all attentions, stacked as they are. gate_up: of each MLP, None for the one that is fed what it expects.
    """

    def __init__(self, qkv: Projection, gate_up: Sequence[Projection | None]) -> None:
        self.qkv, self.gate_up = qkv, nnx.List(gate_up)


class LayerGroup(nnx.Module):
    """Consecutive layers whose attentions live on different devices of the layer axis.

    Layer i's attention is slot i; each device holds `slots` consecutive slots and their KV. MLPs are split over `axes`:
    all devices, or none (replicated). mlp_lp_size: MLPs that the fuzzy pass runs at once. branch: in the exact pass,
    devices that do not own the current slot skip its attention (virtual CPU devices share cores) instead of computing
    what is then masked out (on a GPU the branch would wait for the host).
    """

    def __init__(
        self,
        attention: Attention,
        mlps: Sequence[MLP],
        refit: Refit | None = None,
        *,
        slots: int,
        axes: Axes,
        branch: bool,
        mlp_lp_size: int = 1,
    ) -> None:
        self.attention, self.mlps, self.refit = attention, nnx.List(mlps), nnx.data(refit)
        self.slots, self.axes, self.branch, self.mlp_lp_size = slots, axes, branch, mlp_lp_size

    def fuzzy(self, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
        """All attentions at once on the group's input, then the MLPs in order (the paper's Algorithm 2).

        One all-reduce brings the first attention output; output i + 1 rides along in the all-reduce of MLP i. With
        replicated MLPs all outputs come in the first one. Collectives: layers + 1, or 1. mlp_lp_size MLPs at a time
        are fed what the group has by then: layers / mlp_lp_size + 1, or 1.
        """
        h, cache, _ = self.trace_fuzzy(h, cache, window)
        return h, cache

    def trace_fuzzy(
        self, h: Hidden, cache: KVCache, window: Window
    ) -> tuple[Hidden, KVCache, list[Hidden]]:
        """As fuzzy(), and what each MLP was fed."""
        qkv = self.attention.qkv if self.refit is None else self.refit.qkv
        attend = jax.vmap(lambda attention, slot, own: attention(h, slot, window, qkv=own))
        parts, cache = attend(self.attention, cache, qkv)
        outputs = [self._addend(parts, layer) for layer in range(len(self.mlps))]
        if not self.axes:
            outputs = list(all_reduce(jnp.stack(outputs), ALL_AXES))
        size, fed = self.mlp_lp_size, []
        attended = all_reduce(jnp.stack(outputs[:size]), self.axes)
        for first in range(0, len(outputs), size):
            inputs = list(itertools.accumulate(attended, initial=h))[1:]
            added = self._through_mlps(first, inputs)
            riding = outputs[first + size : first + 2 * size] or [jnp.zeros_like(h)]
            attended = all_reduce(jnp.stack([added + riding[0], *riding[1:]]), self.axes)
            h, fed = inputs[-1], fed + inputs
        return h + attended[0], cache, fed

    def after(self, size: int, fed: Sequence[Hidden]) -> Hidden:
        """Result of a fuzzy pass over the first `size` layers only, from the MLP inputs that trace_fuzzy() returns.

        Later layers of a group change nothing of what earlier ones are fed.
        """
        first = (size - 1) // self.mlp_lp_size * self.mlp_lp_size
        return fed[size - 1] + all_reduce(self._through_mlps(first, fed[first:size]), self.axes)

    def __call__(self, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
        """The layers in order, as the model defines them; as many all-reduces as tensor parallelism has."""
        h, cache, _ = self.trace_exact(h, cache, window)
        return h, cache

    def trace_exact(
        self, h: Hidden, cache: KVCache, window: Window
    ) -> tuple[Hidden, KVCache, list[tuple[Hidden, Hidden]]]:
        """As the exact pass, and what each layer's attention and MLP were fed."""
        fed = []
        for layer, mlp in enumerate(self.mlps):
            attended, cache = self._attend_in_turn(layer, h, cache, window)
            between = h + all_reduce(attended, ALL_AXES)
            fed.append((h, between))
            h = between + all_reduce(mlp(between), self.axes)
        return h, cache, fed

    def _through_mlps(self, first: int, inputs: Sequence[Hidden]) -> Hidden:
        """This share's addend of what consecutive MLPs come to in the fuzzy pass, each on an input of its own."""
        gate_up = self.refit.gate_up if self.refit is not None else [None] * len(self.mlps)
        outputs = (self.mlps[first + i](h, gate_up[first + i]) for i, h in enumerate(inputs))
        return functools.reduce(jnp.add, outputs)

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
        return jnp.where(
            jax.lax.axis_index(LAYER) == owner, parts[slot], jnp.zeros_like(parts[slot])
        )

    def _attend_in_turn(
        self, layer: int, h: Hidden, cache: KVCache, window: Window
    ) -> tuple[Hidden, KVCache]:
        owner, slot = divmod(layer, self.slots)
        attention = jax.tree.map(lambda w: w[slot], self.attention)
        if jax.lax.axis_size(LAYER) == 1:
            return attention(h, cache, window, slot)
        mine = jax.lax.axis_index(LAYER) == owner
        if self.branch:
            return jax.lax.cond(
                mine,
                lambda c: attention(h, c, window, slot),
                lambda c: (jnp.zeros_like(h), c),
                cache,
            )
        attended, cache = attention(h, cache, window, slot, where=mine)
        return jnp.where(mine, attended, jnp.zeros_like(attended)), cache


def run_fuzzy(block: Block, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
    """The fuzzy pass through one block: groups at once, single layers exactly."""
    return (
        block.fuzzy(h, cache, window)
        if isinstance(block, LayerGroup)
        else run_exact(block, h, cache, window)
    )


def load_draft(loader: Loader, layout: Layout, refit: TensorSource | None = None) -> Decoder:
    """A draft whose groups of two and more layers are layer-parallel over the loader's mesh.

    refit: tensors that replace the checkpoint's in fuzzy passes; see easyspec_jax.refit.
    """
    return loader.decoder([load_block(loader, group, mlps, refit) for group, mlps in layout])


def load_block(
    loader: Loader, group: Group, mlp_lp_size: int = 1, refit: TensorSource | None = None
) -> Block:
    """An ordinary layer, or a group of several."""
    if len(group) == 1:
        return loader.layer(group.start)
    layer_axis = loader.mesh.shape[LAYER]
    slots = slots_per_device(group, layer_axis)
    return LayerGroup(
        loader.stacked_attention(group, slots * layer_axis),
        [loader.mlp(index) for index in group],
        None if refit is None else load_refit(loader, group, refit),
        slots=slots,
        axes=loader.axes,
        branch=loader.mesh.devices.flat[0].platform == "cpu",
        mlp_lp_size=mlp_lp_size,
    )


def load_refit(loader: Loader, group: Group, refit: TensorSource) -> Refit:
    """Projections that replace a group's own in fuzzy passes, where the refit has them."""
    fitted = replace(loader, source=Overlay(loader.source, refit))
    held = refit.shapes()
    return Refit(
        fitted.stacked_qkv(
            group,
            slots=slots_per_device(group, loader.mesh.shape[LAYER]) * loader.mesh.shape[LAYER],
        ),
        [
            fitted.gate_up(i) if f"model.layers.{i}.mlp.gate_proj.weight" in held else None
            for i in group
        ],
    )
