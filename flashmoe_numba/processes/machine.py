"""What a machine is: processes that share its name and its start share its memory."""

from __future__ import annotations

import platform
from pathlib import Path


def machine_name() -> str:
    """The same in all processes of this machine since it was started, and in no other's: containers are machines."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"
