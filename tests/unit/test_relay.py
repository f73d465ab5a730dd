"""What mpirun says is passed on byte for byte, but for marks, and for its own lines once it was interrupted."""

import os

import pytest

from flashmoe_numba.processes.relay import Relay, writer_to

MPIRUN = b"[mpiexec@host-1] Sending Ctrl-C to processes as requested\n[mpiexec@host-1] Press Ctrl-C again\n"
ABORT = b"Abort(130) on node 2 (rank 2 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 130) - process 2\n"
PROXY = b"[proxy:0:1@host-2] HYD_pmcd_pmip_control_cmd_cb (proxy_cb.c:480): assert (!closed) failed\n"


class Pipe:
    """A relay whose input is written piece by piece, each of which is read before the next."""

    def __init__(self):
        reading, self._writing = os.pipe()
        self.said = b""
        self.relay = Relay(os.fdopen(reading, "rb", 0), self._take)

    def _take(self, data):
        self.said += data

    def write(self, *pieces):
        for piece in pieces:
            self.relay._pass_on(piece)

    def end(self):
        os.close(self._writing)
        self.relay.end()
        return self.said


@pytest.mark.parametrize(("pieces", "said", "marks"), [
    ([b"", b"plain ", b"text\n"], b"plain text\n", ""),
    ([b"\x1eg\x1er"], b"", "gr"),
    ([b"one\x1egtwo", b"\x1er\n"], b"onetwo\n", "gr"),
    ([b"one\x1e", b"g", b"two\x1e", b"rthree"], b"onetwothree", "gr"),
    ([ABORT], ABORT, ""),
    ([b"half\x1e"], b"half\x1e", ""),
    ([b"\r 50%|## [mpiexec@a] said", MPIRUN], b"\r 50%|## [mpiexec@a] said" + MPIRUN, ""),
])  # fmt: skip
def test_marks_are_taken_out_wherever_pieces_begin(pieces, said, marks):
    pipe = Pipe()
    pipe.write(*pieces)
    assert pipe.end() == said and pipe.relay.marks == marks


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_after_an_interrupt_mpiruns_own_lines_are_left_out(size):
    pipe = Pipe()
    pipe.write(PROXY, b"\r 50%|##")
    pipe.relay.interrupted = True
    rest = MPIRUN + b"flashmoe: interrupted\n" + ABORT + PROXY + b"not [mpi@x] this\nno newline"
    pipe.write(*(rest[i : i + size] for i in range(0, len(rest), size)))
    assert pipe.end() == PROXY + b"\r 50%|##flashmoe: interrupted\nnot [mpi@x] this\nno newline"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_after_an_interrupt_mpiruns_words_about_ranks_that_it_ended_are_left_out(size):
    """As mpich 5.0 prints them on stdout."""
    block = f"""
{"=" * 79}
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 4931 RUNNING AT vm
=   EXIT CODE: 15
=   CLEANING UP REMAINING PROCESSES
=   YOU CAN IGNORE THE BELOW CLEANUP MESSAGES
{"=" * 79}
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Terminated (signal 15)
This typically refers to a problem with your application.
Please see the FAQ page for debugging suggestions
""".encode()
    pipe = Pipe()
    pipe.relay.interrupted = True
    rest = b"latency = 3 ms\n" + block + b"a = b\nThis is said\n"
    pipe.write(*(rest[i : i + size] for i in range(0, len(rest), size)))
    assert pipe.end() == b"latency = 3 ms\na = b\nThis is said\n"


def test_a_relay_reads_until_the_end_and_knows_when_nobody_listens(tmp_path):
    reading, writing = os.pipe()
    with open(tmp_path / "said", "wb") as file:
        relay = Relay(os.fdopen(reading, "rb", 0), writer_to(file.fileno()))
        os.write(writing, b"x" * 100_000)  # more than a pipe holds: it is read
        os.close(writing)
        relay.end()
    assert (tmp_path / "said").read_bytes() == b"x" * 100_000
    reading, writing = os.pipe()
    gone, there = os.pipe()
    os.close(gone)
    relay = Relay(os.fdopen(reading, "rb", 0), writer_to(there))
    os.write(writing, b"x")
    relay.end()
    with pytest.raises(BrokenPipeError):  # as if mpirun wrote there itself
        os.write(writing, b"x")
