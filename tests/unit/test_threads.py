"""Functions that run together in threads which stay: all end before the caller goes on, however a call ends."""

import gc
import threading
import weakref

import pytest
from children import run_python

from flashmoe_numba.backends import threads as module
from flashmoe_numba.backends.threads import Threads, _Call


class Broken(Exception):
    pass


@pytest.fixture
def threads():
    made = Threads()
    yield made
    made.close()


def no_stop():
    raise AssertionError("nothing is to be stopped")


def raise_broken():
    raise Broken


def threads_of_a_call(threads, size):
    """(function, thread) of each; no function ends before all have begun."""
    ran, together = [], threading.Barrier(max(size, 1))
    threads.run([lambda i=i: (together.wait(30), ran.append((i, threading.get_ident()))) for i in range(size)], no_stop)
    return ran


@pytest.mark.parametrize("sizes", [[0], [1], [3] * 200, [2, 5, 1, 4]])
def test_all_functions_of_a_call_run_at_the_same_time_in_threads_that_stay(threads, sizes):
    seen = []
    for size in sizes:
        ran = threads_of_a_call(threads, size)
        assert sorted(i for i, _ in ran) == list(range(size))
        seen += ran
    assert len(set(seen)) == max(sizes), "function i of every call in the same thread"
    assert threading.get_ident() not in {thread for _, thread in seen}


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_function_that_raises_stops_the_others_and_all_end_first(threads, failing):
    stopped, ended, begun = threading.Event(), [], threading.Barrier(3)
    functions = [lambda: (begun.wait(30), stopped.wait(30), ended.append(stopped.is_set()))] * 3
    functions[failing] = lambda: (begun.wait(30), raise_broken())
    with pytest.raises(Broken):
        threads.run(functions, stopped.set)
    assert ended == [True, True]
    threads.run([ended.clear], no_stop)
    assert ended == [], "and there may be another call"


def test_the_last_function_to_end_may_raise_too(threads):
    for _ in range(100):
        with pytest.raises(Broken):
            threads.run([raise_broken], lambda: None)
        with pytest.raises(Broken):
            threads.run([raise_broken, raise_broken], lambda: None)


def test_what_was_raised_before_anybody_waited_is_not_lost():
    call = _Call([raise_broken])
    call.run(0)
    with pytest.raises(Broken):
        call.wait()


def test_nothing_to_run_is_over_at_once():
    _Call([]).wait()


def test_functions_of_threads_that_cannot_start_do_not_run(threads, monkeypatch):
    """The second thread cannot be had; the first function ends when it is told to, the third never begins."""
    stopped, ran = threading.Event(), []
    honest = threading.Thread.start

    def start(thread):
        if thread.name == "flashmoe_1":
            raise RuntimeError("can't start new thread")
        honest(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    functions = [lambda: (stopped.wait(30), ran.append(0)), lambda: ran.append(1), lambda: ran.append(2)]
    with pytest.raises(RuntimeError, match="can't start new thread"):
        threads.run(functions, stopped.set)
    assert ran in ([0], []), "the first may be told before it begins"
    monkeypatch.setattr(threading.Thread, "start", honest)
    threads.run([lambda: None] * 3, no_stop)


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("step", range(8))
def test_an_interrupt_at_any_step_of_the_hand_over_ends_the_call(threads, monkeypatch, step):
    """The caller is interrupted before or after it puts the call into one of the queues."""
    steps, stopped, running = [], threading.Event(), []

    class Queue(module.SimpleQueue):
        def put(self, item):
            if threading.current_thread() is threading.main_thread() and isinstance(item, module._Call):
                interrupt_at(step)
                super().put(item)
                interrupt_at(step)
            else:
                super().put(item)

    def interrupt_at(number):
        steps.append(len(steps))
        if steps[-1] == number:
            raise Interrupted

    def function():
        running.append(1)
        stopped.wait(30)
        running.pop()

    monkeypatch.setattr(module, "SimpleQueue", Queue)
    with pytest.raises(Interrupted):
        threads.run([function] * 4, stopped.set)
    assert stopped.is_set() and running == []
    ran = []
    threads.run([lambda i=i: ran.append(i) for i in range(4)], no_stop)
    assert sorted(ran) == [0, 1, 2, 3], "what was left in a queue runs nothing twice, and nothing of this call is lost"


def test_nothing_of_a_call_is_kept_after_it(threads):
    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    threads.run([lambda thing=thing: None] * 2, no_stop)
    del thing
    threads.run([lambda: None] * 2, no_stop)  # both threads have come back from the first call
    assert gone() is None


def test_threads_end_with_their_owner():
    before = set(threading.enumerate())
    owner = Threads()
    owner.run([lambda: None] * 3, no_stop)
    mine = set(threading.enumerate()) - before
    assert len(mine) == 3
    del owner
    gc.collect()
    for thread in mine:
        thread.join(30)
    assert not any(thread.is_alive() for thread in mine)


def test_two_owners_do_not_share_threads():
    """The functions of one wait for those of the other, which are run by a function of the first."""
    one, two = Threads(), Threads()
    ran = []
    one.run([lambda: two.run([lambda: ran.append(2)], no_stop), lambda: ran.append(1)], no_stop)
    assert sorted(ran) == [1, 2]
    one.close()
    two.close()


IDLE = """
import os, threading, time
from flashmoe_numba.backends.threads import Threads, _Call
threads = Threads()
threads.run([lambda: None] * 3, None)
"""
ENDS = {
    "idle": "",
    "fork": "pid = os.fork()\nif pid:\n    assert os.waitpid(pid, 0)[1] == 0",
    "closed": "threads.close()",
    "busy": """
begun = threading.Event()
work = lambda: (begun.set(), time.sleep(0.3), print("done", flush=True))
threading.Thread(target=lambda: threads.run([work], None), daemon=True).start()
begun.wait()""",
}


@pytest.mark.parametrize("how", ENDS)
def test_the_interpreter_ends_and_lets_running_functions_end_first(how):
    done = run_python("-c", f"{IDLE}{ENDS[how]}", timeout=60)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout == ("done\n" if how == "busy" else "") and done.stderr == ""


CTRL_C = """
import os, signal, threading
from flashmoe_numba.backends.threads import Threads, _Call
threads, stopped = Threads(), threading.Event()
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    threads.run([stopped.wait] * 3, stopped.set)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_comes_while_functions_run():
    done = run_python("-c", CTRL_C, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
