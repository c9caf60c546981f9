"""Processes beside the main one, of which none can keep it waiting."""

import os
import signal
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

import psutil
import pytest

from icm.output import say
from icm.processes import Assistants

LONG = bytes(4_000_000)  # more than a pipe holds


def test_what_nobody_reads_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:  # which writes when it is closed, too
        say("a line", output)


def speak(pipe: Connection) -> None:
    """Send a long message for each that comes."""
    while pipe.recv():
        pipe.send(LONG)


def break_down(pipe: Connection) -> None:
    """Fail as a game does that talks to a server."""
    raise ConnectionRefusedError("no server")


def test_an_error_of_the_connection_is_told_like_any_other() -> None:
    assistants = Assistants(1, break_down)
    assert "ConnectionRefusedError: no server" in assistants.receive(0)
    assistants.end()


def stopped(assistants: Assistants) -> psutil.Process:
    process = psutil.Process(assistants.processes[0].pid)
    os.kill(process.pid, signal.SIGSTOP)
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("system", [os.name, "nt"])
def test_long_messages_arrive(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no resource tracker, as on Windows."""
    if system == "nt":
        monkeypatch.setattr("icm.processes.os", SimpleNamespace(name=system))
        monkeypatch.setattr("icm.processes.resource_tracker", None)
    assistants = Assistants(1, speak, patience=60.0)
    for _ in range(2):
        assistants.send(0, LONG)
        assert assistants.receive(0) == LONG
    assistants.end()


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_one_that_does_not_take_in_what_it_is_sent_is_killed() -> None:
    assistants = Assistants(1, speak, patience=0.5)
    process = stopped(assistants)
    assistants.send(0, LONG)
    psutil.wait_procs([process], timeout=10)
    with pytest.raises((EOFError, OSError)):
        assistants.receive(0)
    assistants.end()


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_one_that_does_not_finish_what_it_has_begun_to_send_is_killed() -> None:
    assistants = Assistants(1, speak, patience=1.0)
    assistants.send(0, b"short")
    assert assistants.pipes[0].poll(30)
    stopped(assistants)
    with pytest.raises((EOFError, OSError)):
        assistants.receive(0)
    assistants.end()
