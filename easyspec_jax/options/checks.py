"""Checks of single values. Messages name the field."""

from typing import Any, SupportsIndex

from easyspec_jax.errors import EasySpecError


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise EasySpecError unless a field's value is one of some choices."""
    if value not in choices:
        raise EasySpecError(f"`{field}` {value!r} is not one of {', '.join(choices)}")


def check_whole(
    field: str, value: Any, least: int, most: int | None = None, note: str = ""
) -> None:
    """Raise EasySpecError unless a field's value is a whole number within bounds.

    Args:
        field: The field's name.
        value: Its value, of any type.
        least: The smallest value allowed.
        most: The largest one, or None.
        note: What the message says after the bounds.

    Raises:
        EasySpecError: The value is not a whole number, or out of bounds.
    """
    # isinstance() with a protocol takes microseconds, and logit_bias may have 100,000 ids.
    if type(value) is not int and not isinstance(value, SupportsIndex):
        raise EasySpecError(f"`{field}` {value!r} must be a whole number")
    if value.__index__() < least or (most is not None and value.__index__() > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise EasySpecError(f"`{field}` {value} must be {limits}{note}")
