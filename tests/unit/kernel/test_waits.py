"""When a wait ends: not for time in which its own process was stopped, and at once when the call was given up."""

from types import SimpleNamespace

import numpy as np
import pytest

from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.fibers import Scheduler
from flashmoe_numba.kernel.control import ABORT

DEADLINE = 1000
WAITS = interpreted("flashmoe_numba.kernel").waits
PROCESSOR = interpreted("flashmoe_numba.kernel").processor
QUEUE = interpreted("flashmoe_numba.kernel").queue
PARAMETERS = SimpleNamespace(deadline_ns=DEADLINE, num_ranks=0, epoch=1)  # no ranks: nobody makes progress
SEGMENTS = SimpleNamespace(wire=None, remote=None)  # nobody looks at them


def run(body):
    """`body(sleep)` as the only fiber of a scheduler whose clock `sleep` turns on."""
    scheduler = Scheduler()

    def sleep(nanoseconds):
        scheduler.switches += nanoseconds

    scheduler.add_block("block 0", lambda: body(sleep), ())
    scheduler.run()


def silences(pauses):
    """What `silence_ns` says after each of these pauses between looks."""
    said = []

    def body(sleep):
        wait = WAITS.begin_wait()
        for nanoseconds in pauses:
            sleep(nanoseconds)
            wait = WAITS.keep_waiting(PARAMETERS, SEGMENTS, wait)
            said.append(WAITS.silence_ns(wait))

    run(body)
    return said


def test_time_in_which_the_process_was_stopped_is_no_silence():
    assert silences([5 * DEADLINE]) == [0]
    assert silences([100, 100, 5 * DEADLINE, 100])[2] == 0


def test_a_stop_is_forgiven_from_a_quarter_of_the_deadline_on():
    assert silences([DEADLINE // 4 + 5]) == [0]
    assert silences([100, 100, DEADLINE // 4 + 5, 100])[2] == 0
    assert silences([DEADLINE // 4 - 5])[0] >= DEADLINE // 4 - 5


def test_silence_while_looking_counts():
    said = silences([100] * 12)
    assert said == sorted(said)
    assert said[-1] > DEADLINE


@pytest.mark.parametrize("given_up", [False, True])
def test_a_processor_leaves_the_rest_of_the_queue_when_the_call_was_given_up(given_up):
    queue = SimpleNamespace(
        counters=np.zeros(2 * QUEUE.NUM_COUNTERS * QUEUE.COUNTER_STRIDE, np.int64),
        tasks=np.zeros(4 * QUEUE.TASK_WORDS, np.int64),
    )
    queue.tasks[:: QUEUE.TASK_WORDS] = PARAMETERS.epoch  # four tasks are ready
    control = np.zeros(64, np.int64)
    control[ABORT] = given_up
    places = []
    run(lambda sleep: places.append(PROCESSOR.wait_for_place(PARAMETERS, 0, SimpleNamespace(control=control), queue)))
    assert places == [-1 if given_up else 0]
