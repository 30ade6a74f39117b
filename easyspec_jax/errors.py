"""The one exception that users see, and a helper for quoting other libraries' exceptions."""


class EasySpecError(ValueError):
    """Bad input or an unusable environment.

    The message is one line that says what is wrong and what to do about it. Commands print it on
    stderr and exit with code 2.

    Examples:
        >>> from easyspec_jax import SamplingParams
        >>> try:
        ...     SamplingParams(top_p=1.5)
        ... except EasySpecError as error:
        ...     print("refused")
        refused
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name if it has none.

    Messages of other libraries run over many lines; ours have one, and quote one.

    Examples:
        >>> first_line(OSError("disk full\\nand a long explanation"))
        'disk full'
        >>> first_line(KeyboardInterrupt())
        'KeyboardInterrupt'
    """
    return next(iter(str(error).splitlines()), type(error).__name__)
