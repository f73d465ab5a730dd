"""As much of CuPy and of NVIDIA's driver as the host's side touches, on a machine without a GPU."""

from .stand_in import StandIn, installed

__all__ = ["StandIn", "installed"]
