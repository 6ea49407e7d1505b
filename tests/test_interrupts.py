"""Tests signals and broken pipes at moments at which they once caused a traceback, a hang or a wrong exit status."""

import os
import random
import signal
import subprocess
import sys

import pytest

from nanometa.common import interrupts
from nanometa.common.interrupts import interrupts_postponed, raise_interrupts, was_interrupted
from nanometa.config import PrepareConfig
from nanometa.data import encoders
from nanometa.data.encoders import Encoders, WorkerDied
from nanometa.data.sources import Piece
from nanometa.data.tokenizer import Tokenizer
from tests.conftest import ROOT

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers():
    """Lets signals raise KeyboardInterrupt, as in prepare.py, until the end of the test."""
    previous = {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background job of a shell would ignore
    raise_interrupts()
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_an_interrupt_is_raised_after_the_block_that_postpones_it_and_once(handlers, number):
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_postponed():
        with interrupts_postponed():
            signal.raise_signal(number)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    with interrupts_postponed():  # nothing is left over
        done.append("later")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt) as raised, interrupts_postponed():
        signal.raise_signal(number)
        raise RuntimeError("a worker process ended by the same signal")
    assert isinstance(raised.value.__context__, RuntimeError)


def test_an_ignored_interrupt_stays_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_interrupts()
    signal.raise_signal(signal.SIGINT)
    interrupts.end_at_once()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_exception_that_follows_from_an_interruption_is_known_as_one():
    try:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("cannot release un-acquired lock")
    except RuntimeError as error:
        assert was_interrupted(error) and was_interrupted(KeyboardInterrupt())
    assert not was_interrupted(RuntimeError()) and not was_interrupted(None)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(["the cat sat on the mat " * 50]), 300)


def pieces(n: int, text: str = "the cat sat " * 20):
    return ((0, number, Piece(text, True)) for number in range(n))


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGKILL, WorkerDied), (signal.SIGTERM, KeyboardInterrupt)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_while_it_writes_a_result_is_noticed(tokenizer, workers, number, raised):
    """The result is larger than the buffer of a pipe, and nobody reads it. With a pipe that all workers write to, the
    parent would wait for its rest forever. SIGTERM is what a scheduler sends to all processes of a job."""
    with Encoders(tokenizer, PrepareConfig(workers=workers)) as pool:
        pool.workers[0].send([Piece("the cat sat " * 100_000, True)])
        assert pool.workers[0].connection.poll(60)  # the worker has begun to write
        os.kill(pool.workers[0].process.pid, number)
        with pytest.raises(raised):
            pool.workers[0].receive()
        with pytest.raises(raised):
            pool.workers[0].send([Piece("a text", True)])
        if workers == 2:
            pool.workers[1].send([Piece("the cat", True)])
            assert len(pool.workers[1].receive()) == 1
    assert not any(worker.process.is_alive() for worker in pool.workers)


def test_an_error_in_a_worker_is_raised_with_its_traceback(tokenizer):
    with Encoders(tokenizer, PrepareConfig(workers=1)) as pool:
        pool.workers[0].send([None])
        with pytest.raises(AttributeError) as raised:
            pool.workers[0].receive()
        assert "In a worker process:\nTraceback" in raised.value.__notes__[0]
        pool.workers[0].send([Piece("the cat", True)])  # the worker goes on
        assert tokenizer.decode(pool.workers[0].receive()[0].ids.tolist()) == "the cat"


def test_a_worker_whose_parent_is_killed_ends():
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from nanometa.config import PrepareConfig
from nanometa.data.encoders import Encoders
from nanometa.data.sources import Piece
from nanometa.data.tokenizer import Tokenizer

with Encoders(Tokenizer.train(iter(["the cat sat on the mat " * 50]), 300), PrepareConfig(workers=2)) as pool:
    pool.workers[0].send([Piece("the cat sat " * 100_000, True)])  # whose result nobody reads
    print("begun", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.kill()
    assert process.communicate(timeout=60) == (
        "",
        None,
    )  # returns when the workers, which also hold the pipe, have ended


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_signals_at_random_moments_are_interruptions(handlers, tokenizer, monkeypatch, workers):
    monkeypatch.setattr(encoders, "BATCH_CHARS", 500)
    signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGTERM))
    rng = random.Random(workers)
    for _ in range(50 if workers == 1 else 1000):
        with pytest.raises(KeyboardInterrupt), Encoders(tokenizer, PrepareConfig(workers=workers)) as pool:
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + 0.02 * rng.random())
            for _ in pool.in_order(pieces(10**9)):
                pass
        assert not any(worker.process.is_alive() for worker in pool.workers)


# ----------------------------------------------------------------------------- the end of a command

PROGRAM = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from nanometa.common.interrupts import raise_interrupts
from nanometa.config.command_line import run_cli

def main(argv):
    raise_interrupts()
    print("begun", flush=True)
    if argv == ["worker's pipe"]:
        reading, writing = os.pipe()
        os.close(reading)
        os.write(writing, b"x")
    if argv == ["signal"]:
        os.kill(os.getpid(), signal.SIGTERM)
    if argv == ["lock"]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise RuntimeError("cannot release un-acquired lock")
    if argv == ["reader"]:
        os.read(0, 1)  # until the reader of stdout has ended
        print("more", flush=True)

run_cli(main)
"""


def end_of(*argv: str) -> tuple[int, str]:
    """Returns the exit status of the program and its text on standard error."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *argv], capture_output=True, text=True, timeout=60)
    assert done.stdout == "begun\n"
    return done.returncode, done.stderr


def test_a_broken_pipe_other_than_the_output_is_no_reader_that_has_ended():
    status, error = end_of("worker's pipe")
    assert status == 1 and error.rstrip().endswith("BrokenPipeError: [Errno 32] Broken pipe")


def test_a_reader_that_has_ended_causes_no_message():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "reader"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"begun\n"
    process.stdout.close()
    os.write(process.stdin.fileno(), b"x")
    assert process.stderr.read() == b"" and process.wait() == 1
    process.stdin.close()
    process.stderr.close()


@pytest.mark.parametrize(
    ("cause", "sentence"),
    [("signal", "interrupted\n"), ("lock", "interrupted (RuntimeError: cannot release un-acquired lock)\n")],
)
def test_an_interruption_is_one_line(cause, sentence):
    assert end_of(cause) == (130, sentence)
