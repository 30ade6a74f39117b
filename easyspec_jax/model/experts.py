"""Mixtures of experts: a router sends each token through a few feed-forward parts of many.

Every device has a share of each expert's inner channels, as of an ordinary MLP's, so that the work
is even whichever experts are chosen. Where that would pad the shares, or cut groups of quantized
columns so that there are more scales, devices have whole experts instead, if rounds read all of
them anyway; see reads().

A pass over few tokens takes out the experts that they use; one over more tokens sends them through
all experts, which reads each expert once. A chunk of a prompt goes through all experts in slices,
or on a CPU, where arithmetic is dear, in blocks of tokens that use the same expert.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from easyspec_jax.arithmetic import ceil_div, power_of_two
from easyspec_jax.checkpoint.config import Activation, MixtureConfig
from easyspec_jax.model.activation import gated
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.projection import Projection
from easyspec_jax.parallel.collectives import shard_count, shard_index
from easyspec_jax.parallel.mesh import Axes

SLICE = 512
"""Most tokens that go through all experts at once: each token's results of all are in memory."""

SORTED_FROM = 65
"""Fewest tokens that are sorted by expert where Experts.sorts is set."""


Way = Literal["chosen", "blocks", "all", "slices"]
"""How a pass goes through the experts; see the methods of Experts of these names."""


class FeedForward(NamedTuple):
    """One device's share of an expert, or of all on a leading axis.

    Attributes:
        gate_up: Matrix whose outputs are [gate | up] of this share: [2 * inner, hidden].
        down: Output matrix, [hidden, inner].
        gate_up_bias: Added to gate and up, or None.
        down_bias: Added to the output, or None. Zero on all devices but one.
    """

    gate_up: Matrix
    down: Matrix
    gate_up_bias: Float[Array, "*experts both"] | None = None
    down_bias: Float[Array, "*experts hidden"] | None = None


class Routes(NamedTuple):
    """The experts that tokens use.

    Attributes:
        experts: Their numbers, the highest score first.
        weights: Factors of their outputs, float32.
    """

    experts: Int[Array, "tokens chosen"]
    weights: Float[Array, "tokens chosen"]


class Blocks(NamedTuple):
    """Tokens that use the same expert, some at a time.

    Attributes:
        expert: The expert of each block.
        tokens: Numbers of the block's tokens.
        weights: Factors of the expert's outputs; 0 where a block has fewer tokens.
    """

    expert: Int[Array, " blocks"]
    tokens: Int[Array, "blocks block"]
    weights: Float[Array, "blocks block"]


class Experts(nnx.Module):
    """One device's share of a mixture of experts, its pre-norm included.

    Attributes:
        router: The norm and the matrix whose outputs are scores of the experts; whole on every
            device.
        parts: The experts, on a leading axis.
        per_token: Experts that a token uses.
        normalizes: Whether the weights of a token's experts are scaled to sum to 1.
        activation: Function of the gates.
        sorts: Whether a pass over many tokens sorts them by expert.
        axes: Mesh axes over which whole experts are dealt out; () if this device has a share of
            each.
    """

    def __init__(
        self,
        router: Projection,
        parts: FeedForward,
        *,
        per_token: int,
        normalizes: bool,
        activation: Activation,
        sorts: bool,
        axes: Axes = (),
    ) -> None:
        self.router, self.parts = router, nnx.data(parts)
        self.per_token, self.normalizes, self.sorts = per_token, normalizes, sorts
        self.activation: Activation = activation
        self.axes = axes

    def __call__(
        self, h: Float[Array, "batch tokens hidden"], gate_up: Projection | None = None
    ) -> Float[Array, "batch tokens hidden"]:
        """Compute this share's addend of the output.

        Args:
            h: Hidden states.
            gate_up: For an MLP's projection; must be None.
        """
        assert gate_up is None, "experts have no refits"
        x = h if self.router.norm is None else self.router.norm(h)
        x = x.reshape(-1, h.shape[-1])
        routes = self.route(x)
        number, tokens = self.parts.gate_up.shape[0], x.shape[0]
        if self.axes:
            routes = _of_device(routes, shard_index(self.axes) * number, number)
        way = way_through(tokens, self.per_token, number, self.sorts, whole=bool(self.axes))
        if way == "chosen":
            y = self._through_chosen(x, routes)
        elif way == "blocks":
            every = number * shard_count(self.axes)
            y = self._through_blocks(x, blocks_of(routes, number, every))
        elif way == "all":
            y = self._through_all(x, routes)
        else:
            y = self._through_slices(x, routes)
        return y.astype(h.dtype).reshape(h.shape)

    def route(self, x: Float[Array, "tokens hidden"]) -> Routes:
        """Choose each token's experts by softmax of the router's scores.

        Args:
            x: Normed hidden states, the same on every device.
        """
        scores = self.router.weight(x[None], jnp.float32)[0]
        if self.router.bias is not None:
            scores = scores + self.router.bias[...].astype(jnp.float32)[None, :]
        weights, experts = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), self.per_token)
        if self.normalizes:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routes(experts.astype(jnp.int32), weights)

    def _through_chosen(
        self, x: Float[Array, "tokens hidden"], routes: Routes
    ) -> Float[Array, "tokens hidden"]:
        """Take out the matrices of each token's experts."""
        each = routes.experts.reshape(-1)
        chosen = jax.tree.map(lambda w: w[each], self.parts)
        # One token for each of the matrices taken out: [tokens * chosen, 1, 1, hidden]
        rows = jnp.repeat(x, self.per_token, axis=0)[:, None, None]
        y = jax.vmap(self._through)(chosen, rows)[:, 0, 0]
        weighted = y * routes.weights.reshape(-1, 1)
        return jnp.sum(weighted.reshape(*routes.experts.shape, -1), axis=1)

    def _through_all(
        self, x: Float[Array, "tokens hidden"], routes: Routes
    ) -> Float[Array, "tokens hidden"]:
        """Multiply all tokens by all experts; those that a token does not use have weight 0."""
        experts, tokens = self.parts.gate_up.shape[0], x.shape[0]
        # [tokens, chosen] -> [experts, tokens]
        rows = jnp.arange(tokens, dtype=jnp.int32)[:, None]
        weights = jnp.zeros((experts, tokens))
        weights = weights.at[routes.experts, rows].set(routes.weights, mode="drop")
        y = jax.vmap(self._through, in_axes=(0, None))(self.parts, x[None])
        return jnp.sum(y[:, 0] * weights[:, :, None], axis=0)

    def _through_slices(
        self, x: Float[Array, "tokens hidden"], routes: Routes
    ) -> Float[Array, "tokens hidden"]:
        """Send some tokens after others through all experts, so that less is in memory at once."""
        tokens = x.shape[0]
        slices = ceil_div(tokens, SLICE)

        def in_slices(y: Array) -> Array:
            y = jnp.pad(y, ((0, slices * SLICE - tokens), (0, 0)))
            return y.reshape(slices, SLICE, -1)

        parts = jax.tree.map(in_slices, (x, routes))
        y = jax.lax.map(lambda part: self._through_all(*part), parts)
        return y.reshape(-1, x.shape[1])[:tokens]

    def _through_blocks(
        self, x: Float[Array, "tokens hidden"], blocks: Blocks
    ) -> Float[Array, "tokens hidden"]:
        """Go through blocks of tokens, each of which uses one expert."""

        def add(total: Array, block: Blocks) -> tuple[Array, None]:
            expert = jax.tree.map(lambda w: w[block.expert], self.parts)
            y = self._through(expert, x[block.tokens][None])[0]
            return total.at[block.tokens].add(y * block.weights[:, None]), None

        return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), blocks)[0]

    def _through(
        self, expert: FeedForward, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens hidden"]:
        """Send tokens through one expert; the result is float32."""
        both = expert.gate_up(x)
        if expert.gate_up_bias is not None:
            both = both + expert.gate_up_bias[None, None, :]
        y = expert.down(gated(self.activation, *jnp.split(both, 2, axis=-1)), jnp.float32)
        if expert.down_bias is not None:
            y = y + expert.down_bias.astype(jnp.float32)[None, None, :]
        return y


def _of_device(routes: Routes, first: Int[Array, ""], count: int) -> Routes:
    """Number the experts of a device from 0; those of others all get the number after the last.

    Args:
        routes: Each token's experts.
        first: The device's first expert.
        count: How many it has.

    Examples:
        >>> routes = Routes(jnp.array([[0, 4, 3]]), jnp.ones((1, 3)))
        >>> _of_device(routes, jnp.array(2), count=2).experts.tolist()
        [[2, 2, 1]]
    """
    own = routes.experts - first
    return routes._replace(experts=jnp.where((own >= 0) & (own < count), own, count))


def way_through(tokens: int, per_token: int, experts: int, sorts: bool, whole: bool = False) -> Way:
    """Choose how a pass goes through the experts.

    Args:
        tokens: Tokens of the pass, in all rows.
        per_token: Experts that a token uses.
        experts: How many a device has, or has shares of.
        sorts: As in Experts.
        whole: Whether these are whole experts, of which it is not known how many are chosen.

    Examples:
        >>> [way_through(tokens, 8, 128, sorts=False) for tokens in (5, 6, 513)]
        ['chosen', 'all', 'slices']
    """
    # Taken out, an expert is read, written and read again.
    if 3 * tokens * per_token <= experts and not whole:
        return "chosen"
    if sorts and tokens >= SORTED_FROM:
        return "blocks"
    return "all" if tokens <= SLICE else "slices"


def reads(tokens: int, mixture: MixtureConfig, width: int, whole: int | None = None) -> int:
    """Count the inner channels that a device reads in a pass over few tokens.

    Args:
        tokens: Tokens of the pass.
        mixture: The experts.
        width: Channels that a device has of each.
        whole: How many experts a device has, if it has whole ones.

    Examples:
        Qwen3-30B-A3B on eight devices. Verifying six tokens reads as much of whole experts as of
        shares, and a plain step more.

        >>> mixture = MixtureConfig(128, 8, 768, True, ())
        >>> reads(6, mixture, 96), reads(6, mixture, 768, whole=16)
        (12288, 12288)
        >>> reads(1, mixture, 96), reads(1, mixture, 768, whole=16)
        (2304, 12288)
    """
    held = mixture.num_experts if whole is None else whole
    way = way_through(tokens, mixture.num_experts_per_tok, held, False, whole is not None)
    if way == "chosen":
        return 3 * tokens * mixture.num_experts_per_tok * width
    return held * width


def products_at_once(
    mixture: MixtureConfig, tokens: int, sorts: bool, held: int | None = None
) -> tuple[int, int]:
    """Return how many experts are multiplied at once, and by how many tokens each.

    Args:
        mixture: The experts.
        tokens: Tokens of the pass, in all rows.
        sorts: As in Experts.
        held: How many experts a device has, if it has whole ones.
    """
    experts, pairs = held or mixture.num_experts, tokens * mixture.num_experts_per_tok
    way = way_through(tokens, mixture.num_experts_per_tok, experts, sorts, held is not None)
    if way == "chosen":
        return pairs, 1
    if way == "blocks":
        return 1, block_size(tokens, pairs, mixture.num_experts)
    return experts, min(tokens, SLICE)


def numbers_in_memory(
    mixture: MixtureConfig,
    hidden: int,
    inner: int,
    tokens: int,
    sorts: bool,
    held: int | None = None,
) -> int:
    """Estimate how many numbers a mixture of experts writes on its way.

    Args:
        mixture: The experts.
        hidden: Size of the hidden states.
        inner: Inner channels of an expert on a device.
        tokens: Tokens of the pass, in all rows.
        sorts: As in Experts.
        held: How many experts a device has, if it has whole ones.
    """
    matrices, results = 3 * inner * hidden, 3 * inner + hidden
    count, each = products_at_once(mixture, tokens, sorts, held)
    experts = held or mixture.num_experts
    way = way_through(tokens, mixture.num_experts_per_tok, experts, sorts, held is not None)
    taken_out = count * matrices if way in ("chosen", "blocks") else 0
    return taken_out + count * each * results


def block_size(tokens: int, pairs: int, experts: int) -> int:
    """Return how many tokens a block has, from the numbers of tokens, of choices and of experts.

    As many as use an expert on average: larger blocks would be filled less, and smaller ones would
    read an expert's matrices more often.

    Examples:
        >>> block_size(tokens=512, pairs=512 * 8, experts=128)
        32
    """
    return min(tokens, power_of_two(ceil_div(pairs, experts)))


def blocks_of(routes: Routes, experts: int, every: int | None = None) -> Blocks:
    """Sort tokens by the experts that they use, in blocks of one size.

    Args:
        routes: Each token's experts.
        experts: How many there are here.
        every: How many there are in all, if that is more.

    Examples:
        Three tokens use experts 0, 2 and 0 of three:

        >>> routes = Routes(jnp.array([[0], [2], [0]]), jnp.array([[0.5], [1.0], [0.25]]))
        >>> blocks = blocks_of(routes, experts=3)
        >>> blocks.weights.tolist()
        [[0.5], [0.25], [1.0], [0.0], [0.0], [0.0]]
    """
    tokens, chosen = routes.experts.shape
    pairs = tokens * chosen
    size = block_size(tokens, pairs, every or experts)
    used = routes.experts.reshape(-1)
    order = jnp.argsort(used, stable=True)
    counts = jnp.sum(jax.nn.one_hot(used, experts, dtype=jnp.int32), axis=0)
    first_pair = jnp.cumsum(counts) - counts
    # 5, 0 and 2 pairs in blocks of 4 make 2, 0 and 1 blocks: experts 0, 0, 2.
    of_expert = -(-counts // size)
    last_block = jnp.cumsum(of_expert)
    number = jnp.arange(min(experts, pairs) + pairs // size, dtype=jnp.int32)
    expert = jnp.searchsorted(last_block, number, side="right").astype(jnp.int32)
    exists = expert < experts
    expert = jnp.minimum(expert, experts - 1)
    within = (number - last_block[expert] + of_expert[expert]) * size
    within = within[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]  # [blocks, block]
    counts_here = exists[:, None] & (within < counts[expert][:, None])
    pair = order[jnp.minimum(first_pair[expert][:, None] + within, pairs - 1)]
    weights = jnp.where(counts_here, routes.weights.reshape(-1)[pair], np.float32(0))
    return Blocks(expert, (pair // chosen).astype(jnp.int32), weights)
