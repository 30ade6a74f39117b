"""Sizes of the chunks in which prompts are prefilled.

A chunk's size is the shape of a compiled program, so a platform has few of them. Small ones keep
short prompts from being padded to long ones; large ones read the weights less often.
"""

from collections.abc import Sequence
from functools import lru_cache

from easyspec_jax.options import Platform

PREFILL_SIZES: dict[Platform, tuple[int, ...]] = {
    "cpu": (16, 32, 64, 128),
    "gpu": (128, 512),
    "tpu": (128, 512),
}
"""Tokens of a row that one pass may prefill, in ascending order.

All are multiples of the first, which divides every capacity: so there is always one that fits.
Attention holds the scores of a whole chunk, which is why accelerators stop at 512.
"""

PASS_OVERHEAD: dict[Platform, int] = {"cpu": 20, "gpu": 256, "tpu": 256}
"""Time of a pass that does not depend on its tokens, that of reading the weights, in tokens.

On a CPU both were measured: XLA multiplies tiles of 32 tokens there, so that 40 take as long as 64.
On an accelerator it is an estimate for weights of two bytes: operations per second over bytes per
second, which by data sheets is 166 on a v5p and 295 on an H100 (plan/machines.py).
"""


def chunks(tokens: int, sizes: Sequence[int], overhead: float, room: int) -> tuple[int, ...]:
    """Return the chunks that cover a prompt at the least cost, the largest first.

    A chunk costs its size and the overhead. The last one may be larger than what is left of the
    prompt, but must fit into the cache.

    Args:
        tokens: Tokens of the prompt, at least one.
        sizes: Sizes to choose from, ascending.
        overhead: Cost of a chunk that does not depend on its size, in tokens.
        room: Cache entries that the chunks may take.

    Examples:
        >>> chunks(39, (16, 64, 128), overhead=20, room=512)
        (64,)
        >>> chunks(270, (16, 64, 128), overhead=20, room=512)
        (128, 128, 16)
        >>> chunks(600, (128, 512), overhead=256, room=640)
        (512, 128)
    """
    # Per token the largest size is the cheapest, so only the rest is a question.
    most = sizes[-1]
    whole = (tokens - 1) // most
    _, rest = _cover(tokens - whole * most, min(room - tokens, most), tuple(sizes), overhead)
    return (most,) * whole + tuple(sorted(rest, reverse=True))


@lru_cache(maxsize=4096)
def _cover(
    tokens: int, slack: int, sizes: tuple[int, ...], overhead: float
) -> tuple[float, tuple[int, ...]]:
    """Return the cost of the cheapest chunks, and these.

    Args:
        tokens: Tokens to cover; nothing is left to do if none or less.
        slack: Cache entries behind them, which padding may take.
        sizes: Sizes to choose from.
        overhead: Cost of each chunk.
    """
    if tokens <= 0:
        return 0.0, ()
    ways = []
    for size in sizes:
        if size <= tokens + slack:
            cost, others = _cover(tokens - size, slack, sizes, overhead)
            ways.append((overhead + size + cost, (size, *others)))
    return min(ways, key=lambda way: (way[0], len(way[1])))
