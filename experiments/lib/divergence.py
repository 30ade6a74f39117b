"""Find where two texts diverge, and how close a tie it was, to tell rounding from an error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from easyspec_jax import Engine
from easyspec_jax.arithmetic import round_up
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.parallel.spmd import partition_specs, spmd

NextLogits = Callable[[Sequence[int]], np.ndarray]
"""Returns the target's logits after a text, float32 [vocabulary]."""

CHUNK = 128
"""Lengths are padded to multiples of this, so that few programs are compiled."""


@dataclass(frozen=True)
class Divergence:
    """The first place where two texts differ.

    Attributes:
        logit_gap: Between the target's logits of the two tokens there.
    """

    place: int
    logit_gap: float


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the index of the first token that two texts do not share, or None.

    Example:
        >>> first_difference([1, 2, 3], [1, 4, 3])
        1
    """
    return next((place for place, (a, b) in enumerate(zip_longest(one, other)) if a != b), None)


def divergence(
    next_logits: NextLogits, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]
) -> Divergence | None:
    """Compare two continuations of a prompt; None if they are the same.

    The gap is nan where one text only ends sooner.
    """
    place = first_difference(one, other)
    if place is None:
        return None
    if place >= min(len(one), len(other)):
        return Divergence(place, float("nan"))
    logits = next_logits([*prompt, *one[:place]])
    return Divergence(place, float(abs(logits[one[place]] - logits[other[place]])))


def next_logits(engine: Engine) -> NextLogits:
    """Compile a pass of the engine's target over whole texts."""
    target = engine.load()[0]
    specs = partition_specs(target), P(), P()
    program = jax.jit(spmd(_logits, engine.mesh, specs, P(ALL_AXES)))

    def behind(ids: Sequence[int]) -> np.ndarray:
        padded = np.zeros((1, round_up(len(ids), CHUNK)), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(program(target, padded, np.int32(len(ids) - 1)), np.float32)

    return behind


def _logits(target: Decoder, ids: Int[Array, "1 tokens"], last: Int[Array, ""]) -> Array:
    caches = target.init_caches(1, ids.shape[1])
    h, _ = target(ids, caches, jnp.zeros((1,), jnp.int32))
    return target.logits(jax.lax.dynamic_slice_in_dim(h, last, 1, axis=1))[0, 0]
