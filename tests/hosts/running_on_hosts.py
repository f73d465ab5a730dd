"""Hosts for tests, namespaces of this machine (experiments/hosts/namespaces.py), and commands that run there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "experiments"))
from hosts import namespaces  # noqa: E402


def require_hosts(on_ci):
    """Skip where there can be none; on CI fail, if all that is missing could be installed."""
    reason = namespaces.why_not()
    if reason:
        pytest.skip(reason)
    missing = namespaces.missing_tools()
    if missing:
        tell = pytest.fail if on_ci else pytest.skip
        tell(f"hosts made of namespaces need {missing}: apt-get install iproute2")


class Running:
    """Commands on hosts, with this checkout's modules and the tests' helpers, as a user's shell would start them."""

    def __init__(self, hosts):
        self.hosts = hosts
        path = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/mpi")]
        left_over = ("PMI_", "PMIX_", "OMPI_", "HYDRA_")
        own = {name: value for name, value in os.environ.items() if not name.startswith(left_over)}
        chosen = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_MAX_SAVED": "4096"}
        self.started = []
        self.environment = own | chosen | {"HWLOC_XMLFILE": "", "PYTHONPATH": os.pathsep.join(path)}

    def start(self, command, on=0, **settings):
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | settings
        process = subprocess.Popen([*self.hosts.on(on), *map(str, command)], env=self.environment, **pipes)
        self.started.append(process)
        return process

    def close(self):
        self.hosts.close()
        for process in self.started:
            process.communicate()

    def run(self, command, on=0, timeout_s=100):
        """What it did, once it is over; its processes are ended where it is not in time."""
        process = self.start(command, on)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            for host in range(len(self.hosts.names)):
                self.hosts.kill(host)
            pytest.fail(f"not over in {timeout_s} s: {process.communicate()}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def flashmoe(self, *arguments, **settings):
        """`flashmoe ... --launcher` on the first host."""
        command = [sys.executable, "-m", "flashmoe_numba", *arguments, "--launcher", str(self.hosts.launcher)]
        return self.run(command, **settings)
