"""When things happen: an event-driven simulator of distributed Mixture-of-Experts schedules, on any hardware.

    config = sim.load_preset("llama-4-scout", num_ranks=8, num_tokens=2048)
    scenario = sim.Scenario(config=config, hardware="8xH100", precision="bfloat16", routing="uniform")
    sim.report(sim.simulate("flashmoe", scenario.make())).latency_us

Importing it needs NumPy only; the compiled engine (`sim.engine.compiled`) needs Numba, the pictures matplotlib.
"""

from reference import MoEConfig, load_preset

from .drafting.knobs import PolicyKnobs
from .engine.timeline import DeadlockError, Timeline
from .policies import POLICY_NAMES, make_knobs, policy_names
from .reading.measures import IDLE_CAUSES
from .reading.page.write import write_page
from .reading.plots import plot_timeline
from .reading.report import Report, report
from .reading.trace import write_chrome_trace
from .simulation import Simulation, simulate
from .world.hardware import Hardware
from .world.machine_files import load_hardware
from .world.machine_names import hardware_names
from .world.placement import balance
from .world.precision import PRECISIONS, Precision, precision
from .world.rounding import round_tokens
from .world.routing import ROUTING_NAMES, SimRouting, make_routing
from .world.scenario import Scenario
from .world.world import World

__all__ = [
    "IDLE_CAUSES",
    "POLICY_NAMES",
    "PRECISIONS",
    "ROUTING_NAMES",
    "DeadlockError",
    "Hardware",
    "MoEConfig",
    "PolicyKnobs",
    "Precision",
    "Report",
    "Scenario",
    "SimRouting",
    "Simulation",
    "Timeline",
    "World",
    "balance",
    "hardware_names",
    "load_hardware",
    "load_preset",
    "make_knobs",
    "make_routing",
    "plot_timeline",
    "policy_names",
    "precision",
    "report",
    "round_tokens",
    "simulate",
    "write_chrome_trace",
    "write_page",
]
