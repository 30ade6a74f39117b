"""The one exception that reaches a user, and how to quote others."""


class EasySpecError(ValueError):
    """Bad input or an unusable environment; the message is one line that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """First line of another library's exception, short enough to be quoted."""
    return next(iter(str(error).splitlines()), type(error).__name__)
