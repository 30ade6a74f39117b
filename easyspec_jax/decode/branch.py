"""A pass that is run or left out, without a copy of the caches that it writes."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

Value = TypeVar("Value")


def run_if(wanted: Bool[Array, ""], body: Callable[[Value], Value], value: Value) -> Value:
    """Return body(value) if that is wanted, and otherwise the value itself.

    A loop of one turn or none. XLA updates the arrays that a loop carries in place, whereas it
    copies those that the branches of a `lax.cond` update.

    Args:
        wanted: The same on all devices if the body communicates.
        body: Returns a pytree of the same structure, shapes and types.
        value: Arrays that the body may update.

    Examples:
        >>> [run_if(jnp.array(wanted), lambda x: x + 1, jnp.zeros(())).item() for wanted in (0, 1)]
        [0.0, 1.0]
    """

    def turn(carry: tuple[Array, Value]) -> tuple[Array, Value]:
        return jnp.zeros((), bool), body(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], turn, (wanted.astype(bool), value))[1]
