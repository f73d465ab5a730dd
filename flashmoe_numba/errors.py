"""What calls of the layer raise."""


class FlashMoEError(RuntimeError):
    """A call was given up: some rank waited for a signal that never came, or left. The layer cannot be used again."""
