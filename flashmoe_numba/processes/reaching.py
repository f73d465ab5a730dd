"""Do hosts reach each other? Each listens on some port while the others knock at every address that it has.

MPI's ranks connect between any two hosts, and mpirun's parts to mpirun; where a connection cannot be made both wait.
Who answers at an address proves by a key that it is the host that was meant: addresses behind a bridge may be others'.
"""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

KNOCK_S = 5.0
KEY_BYTES = 16
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
PORT_VARIABLES = ("FI_TCP_PORT_LOW_RANGE", "MPIEXEC_PORT_RANGE", "MPIR_PARAM_CH3_PORT_RANGE")


class Place(TypedDict):
    """Where a host listens."""

    addresses: list[str]
    port: int
    key: str


class Listener:
    """Listens until the process ends, in a thread of its own."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0), backlog=512)
        key = secrets.token_bytes(KEY_BYTES)
        self.place = Place(addresses=own_addresses(), port=self._socket.getsockname()[1], key=key.hex())
        threading.Thread(target=self._answer, args=(key,), name="flashmoe listener", daemon=True).start()

    def _answer(self, key: bytes) -> None:
        while True:
            with contextlib.suppress(OSError):
                guest, _ = self._socket.accept()
                with guest:
                    guest.sendall(key)


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine that are not for itself alone."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]


def not_reached(places: dict[str, Place]) -> list[str]:
    """Those of these hosts, by name, that cannot be reached from here at any address. One without any is not judged."""
    with ThreadPoolExecutor(max(1, min(len(places), 64))) as pool:
        reached = list(pool.map(_is_reached, places.values()))
    return [name for name, is_reached in zip(places, reached, strict=True) if not is_reached]


def _is_reached(place: Place) -> bool:
    return not place["addresses"] or any(_knock(address, place) for address in place["addresses"])


def _knock(address: str, place: Place) -> bool:
    try:
        with socket.create_connection((address, place["port"]), KNOCK_S) as host:
            return host.recv(KEY_BYTES, socket.MSG_WAITALL) == bytes.fromhex(place["key"])
    except OSError:
        return False
