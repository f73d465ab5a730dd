"""Which network layer MPI uses between hosts, as far as the environment and MPI's own description tell.

It matters for a rank that is lost: over libfabric's tcp ("ofi/tcp") the others are told or wait in vain, and the layer
says so; over UCX and libfabric's other providers a process that sends to a dead one may be ended by MPI.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

SURVIVING = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}  # before MPI begins
SAVED_VARIABLE, SAVED_BY_DEFAULT = "FI_TCP_MAX_SAVED", 64  # libfabric's
PREFERRED = SURVIVING | {SAVED_VARIABLE: "4096"}  # messages that a rank may have sent before they are asked for
PROVIDER_VARIABLES = ("FI_PROVIDER", "MPIR_CVAR_OFI_USE_PROVIDER")
CURE = " ".join(f"{name}={value}" for name, value in PREFERRED.items())


class Netmod(NamedTuple):
    """A network layer; `survives` if the other ranks outlive one that is lost."""

    name: str
    survives: bool

    def warning(self) -> str:
        """What users of several hosts should know of it; "" if nothing."""
        if self.survives:
            return ""
        return f"MPI uses {self.name} between hosts: a lost rank may end all others without a word; set {CURE} for all"


def netmod(MPI: Any) -> Netmod:
    """Of this process.

    Args:
        MPI: mpi4py's; it need not have begun.
    """
    vendor = MPI.get_vendor()[0]
    built = re.search(r"Device:\s*ch4:(\S+(?:[ ,]\S+)*)", MPI.Get_library_version())
    if vendor != "MPICH" or built is None:
        return Netmod(vendor, False)
    first = re.split(r"[ ,]+", built[1])[0]
    name = os.environ.get("MPIR_CVAR_CH4_NETMOD") or first
    if name != "ofi":
        return Netmod(name, False)
    provider = next((os.environ[variable] for variable in PROVIDER_VARIABLES if os.environ.get(variable)), "any")
    return Netmod(f"ofi/{provider}", provider == SURVIVING["FI_PROVIDER"])


def prefer_surviving() -> None:
    """Where the user has chosen nothing: what outlives a lost rank. To be called before MPI begins."""
    for name, value in PREFERRED.items():
        os.environ.setdefault(name, value)


def require_saved(MPI: Any, most: int) -> None:
    """That libfabric over TCP keeps the messages that a rank may send another in a call.

    Of a rank from which more have come than it keeps it reads no further, and does not find those that it has.

    Raises:
        ValueError: it keeps `most` or fewer.
    """
    given = os.environ.get(SAVED_VARIABLE, "")
    saved = int(given) if given.isdecimal() else SAVED_BY_DEFAULT
    if netmod(MPI).name == "ofi/tcp" and saved <= most:
        rule = f"{SAVED_VARIABLE} must be more than {most} before MPI begins"
        why = "a rank may send another so many messages in a call of this layer"
        cure = f"export {SAVED_VARIABLE}={max(int(PREFERRED[SAVED_VARIABLE]), 2 * most)}"
        raise ValueError(f"{rule}, got {given or f'none, which is {saved}'}: {why}; {cure}")


if __name__ == "__main__":  # in a process of its own, because MPI begins: name, survives, may threads call it
    import json

    import mpi4py

    prefer_surviving()
    mpi4py.rc.thread_level = "multiple"
    from mpi4py import MPI

    print(json.dumps([*netmod(MPI), MPI.Query_thread() == MPI.THREAD_MULTIPLE]))
