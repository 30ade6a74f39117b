"""The memory that a pair takes on its devices, before a weight is read or a program compiled.

It counts the engine's own modules and state, with shapes in place of arrays (see abstract.py), so
that the count cannot drift away from what is allocated.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.quantized import Integers
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.sizes import CAPACITY_UNIT
from easyspec_jax.decode.state import RoundConfig, State
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.engine.abstract import (
    abstract_pair,
    abstract_state,
    bytes_per_device,
)
from easyspec_jax.model.experts import Experts, numbers_in_memory, products_at_once
from easyspec_jax.model.matrix import Matrix, bytes_in_memory
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.options import KVDType, Weights
from easyspec_jax.parallel.mesh import TENSOR, Axes, axes_size
from easyspec_jax.parallel.platforms import settings_of

_LARGEST = 2**30
"""More entries than a text has tokens."""


@dataclass(frozen=True)
class Workload:
    """Models and texts that are about to be loaded and decoded.

    Attributes:
        target: The target's configuration.
        draft: The draft's, or None.
        layout: Which layers of the draft run at once.
        refit: Whether the draft has refitted projections as well as its own.
        draft_axes: Mesh axes that the dense parts of the draft are split over.
        mesh: The devices.
        dtype: Type to compute in, and that of caches unless `kv_dtype` says otherwise.
        round: Static options of the programs.
        tokens: Length of the longest text, its prompt included.
        prompt: Length of its prompt.
        rows: Texts decoded together.
        target_held: Whether the target's weights are on the devices already.
        draft_held: Whether the draft's are.
        max_length: The most tokens that any text will have.
        target_weights: Type of the target's matrices; None for those that they are stored in if
            they are quantized, else `dtype`.
        draft_weights: Likewise of the draft's.
        kv_dtype: Type of caches; "auto" is `dtype`.
        prefixes: Bytes that the store of prefixes may take.
        shares: Whether several texts have one prompt, which is prefilled once.
        target_stored: How the target's quantized matrices are stored.
        draft_stored: Likewise the draft's.
        split_for: Tokens of the passes that the target's experts are split for; None for those of
            `round`.
    """

    target: ModelConfig
    draft: ModelConfig | None
    layout: Layout
    refit: bool
    draft_axes: Axes
    mesh: Mesh
    dtype: str
    round: RoundConfig
    tokens: int
    prompt: int
    rows: int
    target_held: bool = False
    draft_held: bool = False
    max_length: int | None = None
    target_weights: Weights | None = None
    draft_weights: Weights | None = None
    kv_dtype: KVDType = "auto"
    prefixes: int = 0
    shares: bool = False
    target_stored: Integers = ()
    draft_stored: Integers = ()
    split_for: int | None = None


@dataclass(frozen=True)
class Need:
    """Bytes needed of one memory: a device's, or the machine's that all virtual devices share.

    Attributes:
        weights: Weights that have not been read yet.
        caches: KV caches of all rows.
        working: The largest intermediate results of one pass.
        prefixes: All that the store of prefixes may take.
    """

    weights: int
    caches: int
    working: int
    prefixes: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.working + self.prefixes


@dataclass(frozen=True)
class Entries:
    """Cache entries of one row.

    Attributes:
        kinds: Of arrays that grow alike, the most entries that they have, and the bytes of one.
    """

    kinds: tuple[tuple[int, int], ...]

    def bytes(self, capacity: int) -> int:
        """Return the bytes of a row whose caches have a capacity.

        Examples:
            Layers that read everything, and others that keep 768 entries:

            >>> Entries(((2**30, 100), (768, 500))).bytes(2048)
            588800
        """
        return sum(min(capacity, most) * each for most, each in self.kinds)


def needed(job: Workload) -> Need:
    """Return the most that a workload will take."""
    models, weights, entries, row = _of_models(_without_texts(job))
    programs = Programs(job.mesh, *models, job.round, job.max_length)
    # The smaller caches are still there while the larger ones are filled from them.
    # capacities() lists the sizes that a cache goes through, such as 256, 512, 1024.
    sizes = programs.sizes.capacities(job.prompt, job.tokens - job.prompt)
    caches = job.rows * (sum(map(entries.bytes, sizes[-2:])) + row)
    if job.shares:
        caches += entries.bytes(programs.sizes.prefix_size(job.prompt, sizes[0]))
    working = max(_working(model, programs, job) for model in models if model is not None)
    shared = _sharing(job.mesh)
    return Need(weights, shared * caches, shared * working, job.prefixes)


def bytes_per_entry(job: Workload) -> int:
    """Return the bytes of one cache entry of one row in both models, as Need counts them."""
    return _sharing(job.mesh) * _of_models(_without_texts(job))[2].bytes(1)


def _sharing(mesh: Mesh) -> int:
    """Return how many devices allocate from one memory: all virtual devices of a CPU."""
    return mesh.size if platform_of(mesh) == "cpu" else 1


def _without_texts(job: Workload) -> Workload:
    """Return a workload that is equal for all texts of the same models."""
    return replace(job, tokens=0, prompt=0, rows=0, max_length=None, prefixes=0, shares=False)


@lru_cache(maxsize=64)  # the flags that would help are found by trying many
def _of_models(job: Workload) -> tuple[tuple[Decoder, Decoder | None], int, Entries, int]:
    """Return what does not depend on the texts.

    Returns:
        The models, the bytes of weights to be read, those of cache entries of one row, and those
        that a row's biases and counts of tokens take.
    """
    models = abstract_pair(
        job.target,
        job.draft,
        job.mesh,
        job.layout,
        job.refit,
        job.draft_axes,
        np.dtype(job.dtype),
        weights=(job.target_weights, job.draft_weights),
        kv_dtype=job.kv_dtype,
        stored=(job.target_stored, job.draft_stored),
        tokens=job.split_for or job.round.split_for,
    )
    target, draft = models
    missing = (None if job.target_held else target, None if job.draft_held else draft)
    programs = Programs(job.mesh, *models, job.round)
    state = abstract_state(programs, 1, CAPACITY_UNIT)
    entries = Entries(_growing(state, abstract_state(programs, 1, _LARGEST)))
    row = bytes_per_device(state.adjustments)
    if platform_of(job.mesh) != "cpu":
        return models, bytes_per_device(missing), entries, row
    # All virtual devices of a CPU share one array of a replicated weight.
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(missing))
    return models, weights, entries, row


def _growing(small: State, large: State) -> tuple[tuple[int, int], ...]:
    """Tell arrays apart by the most entries that they have; see Entries."""
    each = Counter({_LARGEST: bytes_per_device(small.text) // CAPACITY_UNIT})
    caches = zip((*small.target, *small.draft), (*large.target, *large.draft), strict=True)
    for cache, largest in caches:
        each[largest.capacity] += bytes_per_device(cache) // CAPACITY_UNIT
    return tuple(each.items())


def _working(model: Decoder, programs: Programs, job: Workload) -> int:
    """Estimate the bytes of the largest pass on one device: over a prompt's chunk, or a round's."""
    capacity, nodes = programs.sizes.capacity(job.tokens), 1 + job.round.verified
    # A shorter `max_length` that is only tried may be less than the prompt.
    chunk = max(programs.sizes.chunks(min(job.prompt, job.tokens), capacity, job.rows))
    of_pass = partial(_of_pass, model, programs, job, capacity)
    # Of a prompt, only the last token has logits, and only the target's.
    return max(of_pass(chunk, int(model is programs.target)), of_pass(nodes, nodes))


def _of_pass(
    model: Decoder, programs: Programs, job: Workload, capacity: int, tokens: int, nodes: int
) -> int:
    """Estimate the bytes of one pass on one device.

    Per token, in float32: scores and softmax of every head, and one mask, over the cache; three
    arrays of an MLP's inner size; and six of the hidden size. On top come the logits of all nodes
    of a draft, what penalties count for each of them, and what products by quantized matrices and
    mixtures of experts write.

    Args:
        model: The model.
        programs: The programs of the workload.
        job: The workload.
        capacity: Entries of the caches.
        tokens: Tokens of each row.
        nodes: Those of them that have logits.
    """
    config = model.config
    shards = axes_size(job.mesh, model.axes)
    # The exact pass over a group computes one layer at a time, split over "tensor" alone.
    head_shards = shards if model is programs.target else job.mesh.shape[TENSOR]
    heads = ceil_div(config.num_attention_heads, head_shards)
    inner = ceil_div(config.intermediate_size, shards)
    vocabulary = model.embedding.shape[0] // shards
    of_token = 4 * ((2 * heads + 1) * capacity + 3 * inner + 6 * config.hidden_size)
    of_products = _of_products(model, job, tokens)
    arrays = 5 if job.round.kinds.penalties else 3
    return job.rows * (tokens * of_token + arrays * 4 * nodes * vocabulary) + of_products


def _of_products(model: Decoder, job: Workload, tokens: int) -> int:
    """Return the most bytes that mixtures and products by quantized matrices write on their way.

    Args:
        model: Its matrices.
        job: The workload.
        tokens: Tokens of each row in an exact pass.
    """
    written, floats = _of_mixtures(model, job, tokens), 0
    of_experts = {id(matrix) for matrix in _expert_matrices(model)}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Matrix) and module.scale is not None and id(module) not in of_experts:
            # An exact pass multiplies by one slot of a stack at a time, a fuzzy one by all of them.
            slots = _shard_shape(module.scale)[:-2]
            exact = _of_product(module, job.rows * tokens, job.dtype)
            fuzzy = prod(slots) * _of_product(module, job.rows * job.round.width, job.dtype)
            written = max(written, exact, fuzzy)
    if platform_of(job.mesh) == "cpu":
        # XLA's CPU backend makes floats of all matrices first; others convert as they multiply.
        for leaf in jax.tree.leaves(model):
            if leaf.dtype.itemsize < np.dtype(job.dtype).itemsize:
                floats += prod(_shard_shape(leaf))
    return written + np.dtype(job.dtype).itemsize * floats


def _of_mixtures(model: Decoder, job: Workload, tokens: int) -> int:
    """Return the bytes that a mixture of experts writes on its way; 0 without one."""
    config = model.config
    if config.mixture is None:
        return 0
    several, sorts = job.rows * tokens, settings_of(platform_of(job.mesh)).sorts_by_expert
    matrices = _expert_matrices(model)
    # The first mixture's output matrices: experts, and columns of each.
    held, _, inner = _shard_shape(matrices[1].values)
    whole = held if held < config.mixture.num_experts else None
    numbers = numbers_in_memory(config.mixture, config.hidden_size, inner, several, sorts, whole)
    count, each = products_at_once(config.mixture, several, sorts, whole)
    # On top of the results of all experts come those of each product's groups.
    quantized = [matrix for matrix in matrices if matrix.scale is not None]
    products = (_of_product(matrix, each, job.dtype) for matrix in quantized)
    return 4 * numbers + count * max(products, default=0)


def _expert_matrices(model: Decoder) -> list[Matrix]:
    found: list[Matrix] = []
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Experts):
            found += [module.parts.gate_up, module.parts.down]
    return found


def _of_product(matrix: Matrix, tokens: int, dtype: str) -> int:
    """Return the bytes that a product by one slot of a quantized matrix writes on a device."""
    *_, out, inner = _shard_shape(matrix.values)
    groups = _shard_shape(matrix.scale)[-1]
    if matrix.is_fused(out, inner, groups, tokens, dtype):
        return 0
    return bytes_in_memory(out, inner, groups, tokens, dtype)


def _shard_shape(array: Any) -> tuple[int, ...]:
    return array.sharding.shard_shape(array.shape)


def platform_of(mesh: Mesh) -> Any:
    """Return the platform of a mesh's devices, as JAX names it."""
    return mesh.devices.flat[0].platform
