"""Progress: what the engine tells of a run that goes on, and who is shown it, and when."""

import io
import json
import threading
import time

import numpy as np
import pytest
from policy_worlds import make_graph, small_world

from flashmoe_numba import cli
from flashmoe_numba.commands import patience, spread
from sim.engine import compiled, loop
from sim.engine.progress import tasks_done, watched
from sim.policies.outside import TEMPLATE

DEADLINE_S = 30


def test_a_run_tells_how_many_tasks_are_done(monkeypatch):
    graph, told, usual = make_graph("flashmoe", small_world()), [], loop.loop

    def between(state, margin):
        told.append(tasks_done())
        status = usual(state, margin)
        told.append(tasks_done())
        return status

    monkeypatch.setattr(loop, "loop", between)
    assert tasks_done() is None
    compiled.run(graph)
    assert (told[0], told[-1]) == ((0, graph.num_tasks), (graph.num_tasks, graph.num_tasks))
    assert tasks_done() is None


def test_a_run_that_fails_is_over(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "loop", broken)
    graph = make_graph("bulk", small_world())
    with pytest.raises(ZeroDivisionError):
        compiled.run(graph)
    assert tasks_done() is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait_for(text, stream):
    """Until the stream has it."""
    began = time.monotonic()
    while text not in stream.getvalue():
        assert time.monotonic() - began < DEADLINE_S, stream.getvalue()
        time.sleep(0.01)


@pytest.mark.parametrize(("stream", "always"), [(Terminal(), False), (io.StringIO(), True)])
def test_a_slow_one_is_shown(monkeypatch, stream, always):
    monkeypatch.setattr(patience, "SHOWN_AFTER_S", 0)
    monkeypatch.setattr(patience, "EVERY_S", 0.01)
    monkeypatch.setattr("sys.stderr", stream)
    with patience.shown_when_slow("mine.py", always):
        wait_for("mine.py, simulated", stream)
        with watched(5000, np.array([700, 900])):
            wait_for("3.40k/5.00k", stream)
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_quick_one_is_not(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with patience.shown_when_slow("mine.py", True):
        pass
    assert stream.getvalue() == ""


def test_a_clock_goes_on_while_nothing_comes(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(patience, "EVERY_S", 0.01)
    monkeypatch.setattr("sys.stderr", stream)
    with patience.clock("fitting"):
        wait_for("fitting: 00:01", stream)
    for number in spread.progress(range(2), 2, "points"):
        wait_for(f"{number}/2 [00:0{number + 1}<", stream)
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_no_clock_where_there_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with patience.clock("fitting"):
        assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    for _ in spread.progress(range(2), 2, "points"):
        assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    assert stream.getvalue() == ""


def test_nobody_watches_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(patience, "SHOWN_AFTER_S", 0)
    with patience.shown_when_slow("mine.py", False):
        assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_json_on_stdout_is_json_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(patience, "SHOWN_AFTER_S", 0)
    monkeypatch.setattr(patience, "EVERY_S", 0.001)
    path = tmp_path / "slow.py"
    source = TEMPLATE.read_text(encoding="utf-8").replace("    draft = ", "    time.sleep(0.3)\n    draft = ")
    path.write_text(source.replace("from dataclasses", "import time\nfrom dataclasses"), encoding="utf-8")
    flags = ["sim", "--preset", "laptop-text", "--hardware", "4xH100", "--tokens", "64", "--policy", str(path)]
    assert cli.main([*flags, "--progress", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["policy"] == str(path)
    assert f"{path}, simulated" in err
