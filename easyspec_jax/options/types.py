"""On which platform and in which types to compute."""

from typing import Literal, get_args

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options.checks import check_choice

Platform = Literal["cpu", "gpu", "tpu"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
FLOAT_DTYPES = get_args(DType)[1:]
KVDType = Literal["auto", "int8"]
"""Types that key-value caches can be kept in; "auto" is the one that is computed in."""

Weights = Literal["bfloat16", "int8", "int4"]
"""Types that matrices can be kept in, apart from the one that is computed in."""


def resolve_dtype(requested: DType, platform: str, stored: str) -> str:
    """Choose the type to compute in.

    Args:
        requested: The user's choice. "auto" is the checkpoint's type, but float32 on a CPU, where
            XLA has no fast products of narrower types.
        platform: JAX's name of the devices' platform.
        stored: The checkpoint's type.

    Raises:
        EasySpecError: The type is not one of FLOAT_DTYPES.

    Examples:
        >>> resolve_dtype("auto", "gpu", "bfloat16")
        'bfloat16'
    """
    if requested != "auto":
        check_choice("dtype", requested, FLOAT_DTYPES)
        return requested
    if platform == "cpu":
        return "float32"
    if stored not in FLOAT_DTYPES:
        raise EasySpecError(f"the checkpoint's dtype {stored!r} is not supported; give `dtype`")
    return stored


def check_weights(weights: Weights | None, draft_weights: Weights | None) -> None:
    """Raise EasySpecError unless each is None or one of Weights."""
    for field, value in (("weights", weights), ("draft_weights", draft_weights)):
        if value is not None:
            check_choice(field, value, get_args(Weights))
