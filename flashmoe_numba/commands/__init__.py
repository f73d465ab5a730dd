"""The commands of `flashmoe`, one module each."""


class UsageError(Exception):
    """The user asked for something that cannot be done; the text names the argument, its value and the rule."""
