"""FlashMoE in Python: one distributed Mixture-of-Experts layer as one persistent kernel per rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import FlashMoEError
    from .layer.layer import FlashMoE

    __version__: str

__all__ = ["FlashMoE", "FlashMoEError", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the layer, and with it Numba, only when it is asked for."""
    if name == "FlashMoE":
        from .layer.layer import FlashMoE

        return FlashMoE
    if name == "FlashMoEError":
        from .errors import FlashMoEError

        return FlashMoEError
    if name == "__version__":
        from .commands.version import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
