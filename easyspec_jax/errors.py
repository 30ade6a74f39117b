"""The one exception that reaches a user."""


class EasySpecError(ValueError):
    """Bad input or an unusable environment; the message is one line that says what is wrong and what to do."""
