"""Integer arithmetic that several rooms need."""


def ceil_div(dividend: int, divisor: int) -> int:
    """Divide and round up.

    Examples:
        >>> ceil_div(7, 4)
        2
    """
    return -(-dividend // divisor)


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`.

    Examples:
        >>> round_up(130, 128)
        256
    """
    return ceil_div(size, multiple) * multiple


def wrap_seed(seed: int) -> int:
    """Reduce a seed to the 32 bits that the noise is keyed with."""
    return seed % 2**32
