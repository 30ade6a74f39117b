"""A group of layers on the mesh's layer axis: run exactly, in order; or fuzzily, all at once.

A transformer layer adds an attention output and an MLP output to the hidden state h. The exact pass
computes them one after another, because each layer reads what the layers before it made of h:

    h1 = h0 + attention_1(h0);   h1 = h1 + mlp_1(h1)
    h2 = h1 + attention_2(h1);   h2 = h2 + mlp_2(h2)
    ...

The fuzzy pass (EasySpec, arXiv 2502.02493, Algorithm 2) attends with h0 in every layer of a group:

    a1, a2, ... = attention_1(h0), attention_2(h0), ...            at once, on different devices
    h1 = h0 + a1;   h1 = h1 + mlp_1(h1)
    h2 = h1 + a2;   h2 = h2 + mlp_2(h2)
    ...

That changes the draft's proposals a little, never the target's distribution, which the verifier
protects. It also writes inexact keys and values into the draft's cache; calibration, in
`decode/round.py`, replaces those of accepted tokens.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from easyspec_jax.checkpoint.tensors import Overlay, TensorSource
from easyspec_jax.draft.grouping import Group, Layout, slots_per_device
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.cache import KVCache, write
from easyspec_jax.model.experts import Experts
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.transformer import MLP, Block, Decoder, Hidden, PostNorms, run_exact
from easyspec_jax.model.windows import Window, Windows, stacked
from easyspec_jax.parallel.collectives import all_reduce
from easyspec_jax.parallel.mesh import ALL_AXES, LAYER, TENSOR, Axes


class Refit(nnx.Module):
    """Projections that replace a group's own in fuzzy passes, fitted to the inputs they get there.

    Attributes:
        qkv: Queries, keys and values of all attentions, stacked as the group's own.
        gate_up: Gate and up projection of each MLP; None for one that keeps its own.
    """

    def __init__(self, qkv: Projection, gate_up: Sequence[Projection | None]) -> None:
        self.qkv, self.gate_up = qkv, nnx.List(gate_up)


class LayerGroup(nnx.Module):
    """Consecutive layers whose attentions live on different devices of the layer axis.

    Layer i's attention, counted from the group's first layer, is slot i. Each position of the layer
    axis holds `slots` consecutive slots and their KV:

        group of 7, layer axis of 4, slots = 2:    0 1 | 2 3 | 4 5 | 6 -

    Attributes:
        attention: This device's attentions; every leaf has a leading axis of `slots`.
        mlps: MLPs of all layers.
        post_norms: Norms of each layer's outputs, on every device.
        refit: Projections for fuzzy passes, or None.
        slots: Attentions of each position of the layer axis; the last ones may be empty.
        axes: Mesh axes that split the MLPs: all of them, or none (replicated).
        branch: How the exact pass skips other devices' layers. True: devices that do not own the
            layer branch around its attention, which is best on virtual CPU devices, because they
            share cores. False: they compute it and mask it out; on a GPU, a branch would wait for
            the host.
        mlp_lp_size: How many MLPs the fuzzy pass runs at once.
        fused: Whether the fuzzy pass runs its attentions by fused kernels, where their shapes are
            supported.
        kinds: Number of each layer's kind among `ModelConfig.kinds`.
    """

    def __init__(
        self,
        attention: Attention,
        mlps: Sequence[MLP | Experts],
        post_norms: Sequence[PostNorms],
        refit: Refit | None = None,
        *,
        slots: int,
        axes: Axes,
        branch: bool,
        mlp_lp_size: int = 1,
        fused: bool = False,
        kinds: Sequence[int] | None = None,
    ) -> None:
        self.attention, self.mlps, self.refit = attention, nnx.List(mlps), nnx.data(refit)
        self.post_norms = nnx.List(post_norms)
        self.slots, self.axes, self.branch, self.mlp_lp_size = slots, axes, branch, mlp_lp_size
        self.fused = fused
        self.kinds = (0,) * len(mlps) if kinds is None else tuple(kinds)

    def fuzzy(self, h: Hidden, cache: KVCache, windows: Windows) -> tuple[Hidden, KVCache]:
        """Run all attentions at once on the group's input, then the MLPs (the paper's Algorithm 2).

        With mlp_lp_size > 1, that many MLPs at a time run on what the group has by then, each
        with the attention outputs up to its own but without the other MLPs' outputs.

        All-reduces: one, plus one per step of MLPs; the steps are layers / mlp_lp_size, rounded up.
        With replicated MLPs it is one in all.

        Args:
            h: Hidden states before the group, the same on every device.
            cache: This device's caches, `slots` of them stacked.
            windows: Positions of the tokens, for every kind of layer.

        Returns:
            Hidden states after the group, the same on every device; and the caches, written.
        """
        h, cache, _ = self.trace_fuzzy(h, cache, windows)
        return h, cache

    def trace_fuzzy(
        self, h: Hidden, cache: KVCache, windows: Windows
    ) -> tuple[Hidden, KVCache, list[Hidden]]:
        """Run fuzzy(), and also return the input of each MLP."""
        parts, cache = self._attend_at_once(h, cache, windows)
        # Each device has addends of its own layers' outputs. Split MLPs need an all-reduce each,
        # in which the next layer's attention output rides along. For three layers, one at a time:
        #   all-reduce 1:  a1              x1 = h0 + a1 is fed to MLP 1
        #   all-reduce 2:  mlp_1(x1) + a2  x2 = x1 + this sum is fed to MLP 2
        #   all-reduce 3:  mlp_2(x2) + a3  x3 = x2 + this sum is fed to MLP 3
        #   all-reduce 4:  mlp_3(x3)       x3 + this is the group's result
        outputs = [self._addend(parts, layer) for layer in range(len(self.mlps))]
        if self._norms_outputs:
            h, fed = self._through_normed(h, outputs)
            return h, cache, fed
        if not self.axes:
            # Replicated MLPs need no all-reduce, so one brings all outputs; later ones are no-ops.
            outputs = list(all_reduce(jnp.stack(outputs), ALL_AXES))
        size, fed = self.mlp_lp_size, []
        attended = all_reduce(jnp.stack(outputs[:size]), self.axes)  # [size, batch, tokens, hidden]
        for first in range(0, len(outputs), size):
            # Running sums h + a1, h + a1 + a2, ...: the inputs of the MLPs of this step.
            inputs = list(itertools.accumulate(attended, initial=h))[1:]
            added = self._through_mlps(first, inputs)
            riding = outputs[first + size : first + 2 * size] or [jnp.zeros_like(h)]
            attended = all_reduce(jnp.stack([added + riding[0], *riding[1:]]), self.axes)
            h, fed = inputs[-1], fed + inputs
        return h + attended[0], cache, fed

    @property
    def _norms_outputs(self) -> bool:
        return self.post_norms[0].attention is not None

    def _through_normed(self, h: Hidden, addends: Sequence[Hidden]) -> tuple[Hidden, list[Hidden]]:
        """Finish the fuzzy pass of a family that norms each output; see trace_fuzzy().

        A norm needs the sum of its own output's addends, so no output can ride along with another.
        Instead, the first all-reduce brings all attention outputs. There are as many all-reduces as
        without norms, but some carry more.

        Args:
            h: Hidden states before the group.
            addends: This device's addends of the attention outputs.

        Returns:
            Hidden states after the group, and the input of each MLP.
        """
        # For three layers, one at a time; n is the norm of a layer's output:
        #   all-reduce 1:  a1 | a2 | a3  x1 = h0 + n(a1) is fed to MLP 1
        #   all-reduce 2:  mlp_1(x1)     x2 = x1 + n(mlp_1(x1)) + n(a2) is fed to MLP 2
        #   all-reduce 3:  mlp_2(x2)     x3 = x2 + n(mlp_2(x2)) + n(a3) is fed to MLP 3
        #   all-reduce 4:  mlp_3(x3)     x3 + n(mlp_3(x3)) is the group's result
        attended, fed = [], []
        outputs = all_reduce(jnp.stack(addends), ALL_AXES)
        for norms, output in zip(self.post_norms, outputs, strict=True):
            attended.append(norms.after_attention(output))
        for first in range(0, len(addends), self.mlp_lp_size):
            following = attended[first : first + self.mlp_lp_size]
            inputs = list(itertools.accumulate(following, initial=h))[1:]
            h, fed = inputs[-1] + self._mlp_outputs(first, inputs), fed + inputs
        return h, fed

    def after(self, size: int, fed: Sequence[Hidden]) -> Hidden:
        """Compute the result of a fuzzy pass over the group's first layers only.

        Later layers do not change what earlier ones are fed, so a longer group's trace will do.

        Args:
            size: How many layers.
            fed: The inputs of at least `size` MLPs, from trace_fuzzy().
        """
        # The last step of MLPs may be cut short: after 6 layers, 4 MLPs at a time, it is 4 and 5.
        first = (size - 1) // self.mlp_lp_size * self.mlp_lp_size
        return fed[size - 1] + self._mlp_outputs(first, fed[first:size])

    def __call__(self, h: Hidden, cache: KVCache, windows: Windows) -> tuple[Hidden, KVCache]:
        """Run the layers in order, as the model defines them.

        All-reduces: two per layer, as under tensor parallelism; one with replicated MLPs. Arguments
        and results are those of fuzzy().
        """
        h, cache, _ = self.trace_exact(h, cache, windows)
        return h, cache

    def trace_exact(
        self, h: Hidden, cache: KVCache, windows: Windows
    ) -> tuple[Hidden, KVCache, list[tuple[Hidden, Hidden]]]:
        """Run the exact pass, and also return the inputs of each layer's attention and MLP."""
        fed = []
        for layer, mlp in enumerate(self.mlps):
            # Heads are split over the tensor axis and other layers' devices add zero, so the sum
            # runs over all axes.
            attended, cache = self._attend_exactly(layer, h, cache, windows)
            norms = self.post_norms[layer]
            between = h + norms.after_attention(all_reduce(attended, ALL_AXES))
            fed.append((h, between))
            h = between + norms.after_mlp(all_reduce(mlp(between), self.axes))
        return h, cache, fed

    def _attend_at_once(
        self, h: Hidden, cache: KVCache, windows: Windows
    ) -> tuple[Float[Array, "slots batch tokens hidden"], KVCache]:
        """Run all of this device's attentions on the same h; returns each one's output."""
        qkv = self.attention.qkv if self.refit is None else self.refit.qkv
        window, axis = self._slot_windows(windows)
        if self.fused and axis is None and self.attention.can_fuse():
            return self.attention.fused(h, cache, window, qkv)
        rotated = jax.vmap(
            lambda attention, own, window: attention.rotated(h, window, own), in_axes=(0, 0, axis)
        )
        q, k, v = rotated(self.attention, qkv, window)  # [slots, batch, heads, tokens, head_dim]
        # One write for all slots. Under vmap it would be a scatter, which XLA bounds-checks.
        cache = write(cache, k, v, windows[0].start)
        attend = jax.vmap(
            lambda attention, q, own, window: attention.attend(q, own, window),
            in_axes=(0, 0, 0, axis),
        )
        return attend(self.attention, q, cache, window), cache

    def _slot_windows(self, windows: Windows) -> tuple[Window, Window | None]:
        """Return the window of this device's slots, and its axes to `vmap` over.

        Layers of different kinds have a window each, stacked on axis 0; layers of one kind share
        one.
        """
        if len(set(self.kinds)) == 1:
            return windows[self.kinds[0]], None
        # Kinds 0 0 1 0 0 on a layer axis of 3, two slots each; an empty slot may have any:
        #   0 0 | 1 0 | 0 -
        devices = jax.lax.axis_size(LAYER)
        table = np.zeros(devices * self.slots, np.int32)
        table[: len(self.kinds)] = self.kinds
        own = jnp.asarray(table.reshape(devices, -1))[jax.lax.axis_index(LAYER)]
        return stacked(windows, own)

    def _through_mlps(self, first: int, inputs: Sequence[Hidden]) -> Hidden:
        """Sum this share's outputs of consecutive MLPs in the fuzzy pass, each on its own input."""
        return functools.reduce(jnp.add, self._mlp_addends(first, inputs))

    def _mlp_addends(self, first: int, inputs: Sequence[Hidden]) -> list[Hidden]:
        """Compute this share of the outputs of consecutive MLPs in the fuzzy pass."""
        outputs = []
        for layer, h in enumerate(inputs, first):
            gate_up = None if self.refit is None else self.refit.gate_up[layer]
            outputs.append(self.mlps[layer](h, gate_up))
        return outputs

    def _mlp_outputs(self, first: int, inputs: Sequence[Hidden]) -> Hidden:
        """Sum whole outputs of consecutive MLPs, each normed where the family does."""
        if not self._norms_outputs:
            return all_reduce(self._through_mlps(first, inputs), self.axes)
        outputs = all_reduce(jnp.stack(self._mlp_addends(first, inputs)), self.axes)
        normed = []
        for layer, output in enumerate(outputs, first):
            normed.append(self.post_norms[layer].after_mlp(output))
        return functools.reduce(jnp.add, normed)

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """Make this device's part of an empty cache, slots in front."""
        one = self.attention.init_cache(batch, capacity)
        return jax.tree.map(lambda x: jnp.repeat(x[None], self.slots, axis=0), one)

    def cache_spec(self) -> KVCache:
        """Return how the cache is split: slots over the layer axis, heads over the tensor axis."""
        return self.attention.cache_spec(P(LAYER, TENSOR, None, None))

    def _addend(self, parts: Float[Array, "slots batch tokens hidden"], layer: int) -> Hidden:
        """Return this device's addend of a layer's attention output, zero unless it owns the layer.

        The sum of all devices' addends is the output.
        """
        owner, slot = divmod(layer, self.slots)
        return jnp.where(
            jax.lax.axis_index(LAYER) == owner, parts[slot], jnp.zeros_like(parts[slot])
        )

    def _attend_exactly(
        self, layer: int, h: Hidden, cache: KVCache, windows: Windows
    ) -> tuple[Hidden, KVCache]:
        """Run one layer's attention where it lives; elsewhere add zero and keep the cache."""
        # Every device takes out its own attention of that slot; only the owner's is this layer's.
        owner, slot = divmod(layer, self.slots)
        window = windows[self.kinds[layer]]
        attention = _of_slot(self.attention, slot)
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
        attended, cache = attention(h, cache, window, slot, mask=mine)
        return jnp.where(mine, attended, jnp.zeros_like(attended)), cache


def _of_slot(stack: Attention, slot: int) -> Attention:
    """Take one attention out of a stack; each matrix decides whether it has to be cut out."""

    def is_matrix(leaf: Any) -> bool:
        return isinstance(leaf, Matrix)

    def own(leaf: Any) -> Any:
        return leaf.at(slot) if is_matrix(leaf) else leaf[slot]

    return jax.tree.map(own, stack, is_leaf=is_matrix)


def run_fuzzy(block: Block, h: Hidden, cache: KVCache, windows: Windows) -> tuple[Hidden, KVCache]:
    """Run a block in the fuzzy pass: groups all at once, single layers exactly."""
    return (
        block.fuzzy(h, cache, windows)
        if isinstance(block, LayerGroup)
        else run_exact(block, h, cache, windows)
    )


def load_draft(loader: Loader, layout: Layout, refit: TensorSource | None = None) -> Decoder:
    """Load a draft whose groups of two and more layers are layer-parallel.

    Args:
        loader: Loader of the draft's checkpoint, onto a mesh.
        layout: The draft's groups.
        refit: Tensors that replace the checkpoint's in fuzzy passes; see easyspec_jax.refit.
    """
    return loader.decoder([load_block(loader, group, mlps, refit) for group, mlps in layout])


def load_block(
    loader: Loader, group: Group, mlp_lp_size: int = 1, refit: TensorSource | None = None
) -> Block:
    """Load a group of layers, or an ordinary layer if the group has but one.

    Args:
        loader: Loader of the draft's checkpoint, onto a mesh.
        group: The layers.
        mlp_lp_size: How many MLPs the fuzzy pass runs at once.
        refit: Tensors that replace the checkpoint's in fuzzy passes.
    """
    if len(group) == 1:
        return loader.layer(group.start)
    layer_axis = loader.mesh.shape[LAYER]
    # Seven layers on a layer axis of four: two slots per position, eight in all, the last one zero.
    slots = slots_per_device(group, layer_axis)
    return LayerGroup(
        loader.stacked_attention(group, slots * layer_axis),
        [loader.mlp(index) for index in group],
        [loader.post_norms(index) for index in group],
        None if refit is None else load_refit(loader, group, refit),
        slots=slots,
        axes=loader.axes,
        branch=loader.platform == "cpu",
        mlp_lp_size=mlp_lp_size,
        # The kernel rotates whole heads.
        fused=loader.kernels.fused_attention
        and all(kind.rope.dim == loader.config.head_dim for kind in loader.config.kinds),
        kinds=[loader.config.kind_of(layer) for layer in group],
    )


def load_refit(loader: Loader, group: Group, refit: TensorSource) -> Refit:
    """Load a group's projections for fuzzy passes: the refit's where it has any, else its own.

    Args:
        loader: Loader of the draft's checkpoint, onto a mesh.
        group: The layers, at least two.
        refit: Canonical tensors of the refit.
    """
    fitted = replace(loader, source=Overlay(loader.source, refit))
    # Without a gate and up of its own in the refit, an MLP is fed what it expects: see stale_sites.
    refitted = refit.shapes()
    gate_up: list[Projection | None] = []
    for layer in group:
        is_refitted = f"model.layers.{layer}.mlp.gate_proj.weight" in refitted
        gate_up.append(fitted.gate_up(layer) if is_refitted else None)
    layer_axis = loader.mesh.shape[LAYER]
    slots = slots_per_device(group, layer_axis) * layer_axis
    return Refit(fitted.stacked_qkv(group, slots=slots), gate_up)
