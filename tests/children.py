"""Fresh Python processes, which can import the project and the tests' helpers, from wherever they are started."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments, timeout=100, **variables):
    """What a process did that has ended, with these variables in its environment."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | variables
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def printed(*arguments, **variables):
    """What a process printed that must succeed."""
    done = run_python(*arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout
