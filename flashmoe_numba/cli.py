"""`flashmoe COMMAND ...`: one small module of `commands` per command, imported when it is asked for.

A command has `add_arguments(parser)` and `main(args) -> exit status`. Whatever the user got wrong is one line on stderr
and exit status 2; under mpirun only rank 0 says it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import UsageError
from .processes.launch import is_first_rank

COMMANDS = {
    "run": "run one layer on this machine, check it against the reference, and time it beside BLAS",
    "models": "public models whose layers this computes: routers, experts, what each was tested with",
    "plan": "what a layer needs, without running it: bytes, packets, tiles, operations",
    "sim": "simulate schedules of a layer on hardware that need not be here: time, shares, causes",
    "explain": "where the time of one simulation goes, and what would make it shorter",
    "calibrate": "measure this machine by the kernel's trace, as hardware for sim",
    "validate": "published measurements beside the simulator's, with the errors; fit its rates",
    "explore": "run the kernel's source under many interleavings: races, deadlocks, wrong results",
    "compile": "build the kernels for GPUs, without one, and check the machine code that came out",
    "cache": "where compiled kernels are kept and how much room they take; clear them",
    "check": "property tests of any MoE layer, yours too: the oracle, odd sizes, NaN, batch invariance",
    "sweep": "simulate all combinations of a grid into one file, on all cores",
    "plot": "figures of a sweep's rows: scaling, shares of time, which schedule is fastest where",
    "doctor": "what this machine can run and why not, each with the fix",
}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message)


class _Version(argparse.Action):
    """Says the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .commands.version import version

        print(f"{parser.prog} {version()}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `flashmoe` with these arguments, by default those of the process; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "flashmoe"
    try:
        command = _choose(argv)
        name = f"flashmoe {command}"
        with _one_line_warnings(name):
            status = _run(command, name, argv)
        if sys.stdout is not None:  # it is None where it was closed before we began
            sys.stdout.flush()
        return status
    except UsageError as error:
        _say(f"{name}: error: {error}")
        return 2
    except KeyboardInterrupt:
        _say(f"{name}: interrupted")
        return 130
    except MemoryError as error:
        _say(f"{name}: error: out of memory{f': {error}' if str(error) else ''}")
        return 1
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it exits
        return 1
    except OSError as error:
        _say(f"{name}: error: {error}")
        return 1


@contextmanager
def _one_line_warnings(name: str) -> Iterator[None]:
    """Warnings look like errors, without the line of our source that they came from."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{name}: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _run(command: str, name: str, argv: list[str]) -> int:
    module = importlib.import_module(f".commands.{command}", __package__)
    parser = _Parser(prog=name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    args = parser.parse_args(argv[1:], argparse.Namespace(argv=argv))
    return int(module.main(args))


def _say(message: str) -> None:
    if is_first_rank():
        print(message, file=sys.stderr)


def _choose(argv: list[str]) -> str:
    """The command's name; prints the help and leaves if that is what is asked for."""
    table = "\n".join(f"  {name:11}{summary}" for name, summary in COMMANDS.items())
    parser = _Parser(
        prog="flashmoe",
        usage="flashmoe COMMAND [--help] ... | --version | --help",
        description="A distributed Mixture-of-Experts layer as one persistent kernel per rank.",
        epilog=f"commands:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below; each has its own --help")
    return str(parser.parse_args(argv[:1]).command)
