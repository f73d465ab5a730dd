"""Question: what does it cost to spread a layer over two hosts, and is it what the simulator says?

Command:  python experiments/06_two_hosts.py [--repeats N] [--json FILE]              as root, on Linux with iproute2
Expected: over an unlimited link at most 1.25 times the same ranks on one host. With the link limited to 1 Gbit/s at
          least 0.8 of what bytes and products allow; and the simulator, which knows what `flashmoe doctor` measured
          there, within 20 %.

Hosts are network namespaces of this machine (hosts/namespaces.py), so that they share its cores: two hosts have not
more of them than one. The link is limited by `tc`, in both directions. Each repeat runs `flashmoe run` once on one host
and once on two hosts over each link, in turn; a run's latency is the median of its calls, and the table has medians of
runs.

`link` is bytes of rows and results that leave the busier host, over what a stream of large messages had; `allowed` is
the longer of that and of the time on one host, and `share` how much of it was reached. `simulated` is the policy
flashmoe on this machine as `flashmoe calibrate` measures it, with the network of `flashmoe doctor`, and what cores
carry there; where there are fewer cores than processors each has its part of one, for products and for carrying.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from common import Row, machine, parser_of, show, store
from hosts.namespaces import Hosts
from hosts_common import require_hosts

import sim
from flashmoe_numba import FlashMoE
from flashmoe_numba.bench.calibrate import Settings, calibrate
from flashmoe_numba.commands.calibrate import hardware_of, knobs_of
from flashmoe_numba.commands.flags import integer
from flashmoe_numba.processes.cores import count_cores
from reference import Weights, load_preset, make_workload
from sim.world.machine_files import to_toml
from sim.world.routing import blocked_owner

NUM_HOSTS, RANKS_PER_HOST = 2, 2
RANKS = NUM_HOSTS * RANKS_PER_HOST
LINKS = {"unlimited": None, "1 Gbit/s": 1000.0}  # 1e6 bit/s
WORKLOAD = "uniform"
COLUMNS = {
    "link": "", "one_host ms": ".1f", "two_hosts ms": ".1f", "ratio": ".2f", "gbps": ".3f", "link_ms": ".1f",
    "allowed ms": ".1f", "share": ".2f", "simulated ms": ".1f", "error": "+.1%",
}  # fmt: skip


def main() -> int:
    args = arguments()
    require_hosts(args)
    preset, tokens, repeats = ("laptop-tiny", 12, 1) if args.smoke else ("laptop-gemm", 256, args.repeats)
    layer = Layer(preset, tokens, args.iterations)
    local, knobs = calibrated(layer.config.dtype, repeats=1 if args.smoke else 5)
    rows = [row | machine() for row in measure(layer, local, knobs, repeats)]
    show(rows, COLUMNS)
    store(rows, args.json)
    return 0


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=integer(1), default=5, help="runs of each kind, in turn [5]")
    parser.add_argument("--iterations", type=integer(1), default=10, help="measured calls of a run [10]")
    args: argparse.Namespace = parser.parse_args()
    return args


class Layer:
    """What is run, its routing, and the bytes that leave a host."""

    def __init__(self, preset: str, tokens: int, iterations: int) -> None:
        base = load_preset(preset)
        self.config = replace(
            base, num_ranks=RANKS, num_tokens=tokens, num_experts=-(-base.num_experts // RANKS) * RANKS
        )
        sizes = dict(preset=preset, ranks=RANKS, tokens=tokens, experts=self.config.num_experts)
        how = dict(workload=WORKLOAD, processors=1, iterations=iterations, json="-")
        self.flags = [part for name, value in {**sizes, **how}.items() for part in (f"--{name}", str(value))]
        workload = make_workload(WORKLOAD, self.config)
        with FlashMoE(self.config, Weights.random(self.config), num_processors=1) as layer:
            layer(workload.x)
            self.topk_idx = np.stack([routing.topk_idx for routing in layer.routing])

    def leaving_bytes(self) -> int:
        """Of rows and results, from the busier host."""
        owner_host = self.topk_idx // self.config.num_experts_per_rank // RANKS_PER_HOST
        rows = np.zeros((NUM_HOSTS, NUM_HOSTS), np.int64)
        for rank, hosts in enumerate(owner_host):
            rows[rank // RANKS_PER_HOST] += np.bincount(hosts.ravel(), minlength=NUM_HOSTS)
        np.fill_diagonal(rows, 0)
        return int((rows.sum(1) + rows.sum(0)).max()) * self.config.hidden * self.config.numpy_dtype.itemsize

    def simulate(self, hardware: sim.Hardware, knobs: sim.PolicyKnobs) -> float:
        """Milliseconds."""
        owner = blocked_owner(self.config.num_experts, RANKS)
        routing = sim.SimRouting(
            name=WORKLOAD, num_experts=self.config.num_experts, topk_idx=self.topk_idx, owner=owner
        )
        scenario = sim.Scenario(config=self.config, hardware=hardware, precision=self.config.dtype, routing=routing)
        return sim.simulate("flashmoe", scenario.make(), knobs).latency_us / 1000


def calibrated(dtype: str, repeats: int) -> tuple[sim.Hardware, sim.PolicyKnobs]:
    """One host of this machine, and how the policy does what the kernel does."""
    settings = Settings(num_ranks=RANKS_PER_HOST, num_processors=1, dtype=dtype, repeats=repeats)
    found = calibrate(settings)
    return hardware_of(found, settings), sim.make_knobs("flashmoe", knobs_of(found, settings))


def shared_cores(hardware: sim.Hardware) -> sim.Hardware:
    """With what processors have of their cores where there are fewer of these."""
    part = min(1.0, count_cores() / RANKS)
    tflops = {name: rate * part for name, rate in hardware.tflops.items()}
    rates = {name: getattr(hardware, name) * part for name in ("hbm_gbps", "l2_gbps", "core_gbps")}
    return replace(hardware, tflops=tflops, **rates)


def measure(layer: Layer, local: sim.Hardware, knobs: sim.PolicyKnobs, repeats: int) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in ("one", *LINKS)}
    networks: dict[str, sim.Hardware] = {}
    for _ in range(repeats):
        for name, mbit in LINKS.items():
            with Hosts(NUM_HOSTS) as hosts:
                if mbit is not None:
                    hosts.limit(mbit)
                if name not in networks:
                    networks[name] = doctor(hosts, local)
                times["one"].append(run(hosts, 1, layer))
                times[name].append(run(hosts, NUM_HOSTS, layer))
    one = median(times["one"])
    return [row_of(name, one, median(times[name]), layer, networks[name], knobs) for name in LINKS]


def run(hosts: Hosts, num_hosts: int, layer: Layer) -> float:
    """Milliseconds of a call, of ranks on so many hosts."""
    report = json.loads(flashmoe(hosts, "run", *layer.flags, "--hosts", ",".join(hosts.names[:num_hosts])))
    if not report["passed"] or report["hosts"] != num_hosts:
        sys.exit(f"not a run on {num_hosts} hosts that passed: {report['failures']}")
    return float(report["latency_ms"]["median"])


def doctor(hosts: Hosts, local: sim.Hardware) -> sim.Hardware:
    """The machine with what is measured between the hosts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hosts.toml"
        file.write_text(to_toml(local))
        flashmoe(hosts, "doctor", "--hosts", ",".join(hosts.names), "--machine-file", str(file))
        return sim.load_hardware(str(file))


def flashmoe(hosts: Hosts, *arguments: str) -> str:
    """What a command on the first host prints."""
    command = [*hosts.on(0), sys.executable, "-m", "flashmoe_numba", *arguments, "--launcher", str(hosts.launcher)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:  # it has said why
        sys.exit(done.returncode)
    return done.stdout


def row_of(name: str, one: float, two: float, layer: Layer, hardware: sim.Hardware, knobs: sim.PolicyKnobs) -> Row:
    link_ms = layer.leaving_bytes() / hardware.nic_gbps / 1e6
    allowed, simulated = max(one, link_ms), layer.simulate(shared_cores(hardware), knobs)
    return {
        "link": name,
        "tokens": layer.config.num_tokens,
        "one_host": one,
        "two_hosts": two,
        "ratio": two / one,
        "gbps": hardware.nic_gbps,
        "latency_us": hardware.nic_latency_ns / 1000,
        "link_ms": link_ms,
        "allowed": allowed,
        "share": allowed / two,
        "simulated": simulated,
        "error": simulated / two - 1,
    }


if __name__ == "__main__":
    sys.exit(main())
