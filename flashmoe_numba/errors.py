"""What this package raises of its own. Imports nothing, because everybody imports it."""


class FlashMoEError(RuntimeError):
    """A call was given up: some rank waited for a signal that never came, or left. The layer cannot be used again."""


class UsageError(Exception):
    """The user asked for something that cannot be done; the text names the argument, its value and the rule."""
