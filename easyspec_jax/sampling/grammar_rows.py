"""Rows with grammars on the devices: compiled rounds ask the host what may follow, and what must.

The host answers from the arguments alone (see grammar.py), so it does not matter when, in which
order or how often devices ask.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.parallel.collectives import shard_count, shard_index
from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.sampling.grammar import WORD, Grammars
from easyspec_jax.sampling.vocabulary import NO_TOKEN

PIECE = 16384
"""Numbers of an argument of a callback at most."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["number", "output", "count", "ahead"],
    meta_fields=[],
)
@dataclass(frozen=True)
class GrammarRows:
    """Each row's grammar, and what it has to go on from.

    Attributes:
        number: The grammar's number; NO_GRAMMAR for none.
        output: Tokens of the output.
        count: How many there are.
        ahead: How many of the last ones are forced and not verified yet.
    """

    number: Int[Array, " batch"]
    output: Int[Array, "batch room"]
    count: Int[Array, " batch"]
    ahead: Int[Array, " batch"]

    def with_output(
        self, tokens: Int[Array, "batch some"], num_tokens: Int[Array, " batch"]
    ) -> Self:
        """Append tokens to each row's output.

        Args:
            tokens: New tokens, then NO_TOKEN.
            num_tokens: How many there are.
        """
        columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        # Places out of bounds are dropped: those of columns that do not count.
        room = self.output.shape[1]
        places = jnp.where(tokens != NO_TOKEN, self.count[:, None] + columns, room)
        put = jax.vmap(lambda row, place, ids: row.at[place].set(ids, mode="drop"))
        output = put(self.output, places, tokens)
        return replace(self, output=output, count=self.count + num_tokens)


class Forced(NamedTuple):
    """Tokens that come next in each text because its grammar allows no others.

    Attributes:
        tokens: The tokens; only the first `num_tokens` mean anything.
        num_tokens: How many there are.
    """

    tokens: Int[Array, "batch most"]
    num_tokens: Int[Array, " batch"]


def within_grammar(
    logits: Float[Array, "batch nodes vocab_shard"],
    drafted: Int[Array, "batch nodes levels"],
    rows: GrammarRows,
    axes: Axes,
    grammars: Grammars,
) -> Float[Array, "batch nodes vocab_shard"]:
    """Mask the tokens that each row's grammar does not allow after each node's path.

    Arguments are those of adjust().
    """
    size = logits.shape[-1]
    words = ceil_div(size * shard_count(axes), WORD)
    batch, nodes, levels = drafted.shape
    masks = _ask(
        partial(grammars.masks, words, (batch, nodes, levels)),
        (batch, nodes, words),
        *(rows.number, rows.count, rows.ahead, drafted, rows.output),
    )
    # Words of 32 bits become a column for each id, of which this shard has its own:
    #   [batch, nodes, words, 32] -> [batch, nodes, words * 32] -> [batch, nodes, vocab_shard]
    shifts = jnp.arange(WORD, dtype=jnp.int32)[None, None, None, :]
    bits = (masks[..., None] >> shifts) & 1
    bits = bits.reshape(batch, nodes, words * WORD)
    own = jax.lax.dynamic_slice_in_dim(bits, shard_index(axes) * size, size, axis=2)
    return jnp.where(own == 1, logits, -jnp.inf)


def forced_tokens(rows: GrammarRows, most: int, grammars: Grammars) -> Forced:
    """Find the tokens that each text goes on with because its grammar allows no others.

    Args:
        rows: Each row's grammar and output.
        most: Tokens to find at most.
        grammars: The grammars that rows have by number.
    """
    batch = rows.number.shape[0]
    answer = _ask(
        partial(grammars.forced, (batch, most)), (batch, most), rows.number, rows.count, rows.output
    )
    return Forced(answer, jnp.sum(answer != NO_TOKEN, axis=1, dtype=jnp.int32))


def _ask(
    answer: Callable[..., Any], shape: tuple[int, ...], *columns: Int[Array, "batch ..."]
) -> Array:
    """Call the host with the columns of each row, and return its answer: int32 of a shape."""
    batch = shape[0]
    asked = jnp.concatenate([column.reshape(batch, -1) for column in columns], axis=1).reshape(-1)
    # In pieces, since JAX copies small arrays for a callback at once. For a larger one it waits for
    # a thread of a pool, and all of them may be waiting for this answer.
    pieces = [asked[first : first + PIECE] for first in range(0, asked.size, PIECE)]
    return jax.pure_callback(answer, jax.ShapeDtypeStruct(shape, np.int32), *pieces)
