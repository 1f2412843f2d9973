"""SIGTERM and SIGINT: a flag inside a loop, `Stopped` elsewhere, an end at the second, the old handlers afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from cvm_translator.errors import Stopped
from cvm_translator.training.signals import StopRequest


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_inside_a_loop_a_signal_is_a_flag(number: signal.Signals, exit_code: int) -> None:
    with StopRequest() as stop:
        with stop.deferred():
            stop.raise_if_requested()
            os.kill(os.getpid(), number)
            assert stop.signal_number == number
        with pytest.raises(Stopped) as stopped:
            stop.raise_if_requested()
    assert stopped.value.exit_code == exit_code


def test_elsewhere_it_raises_at_once_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_in_a_thread_it_only_waits_for_a_request() -> None:
    seen: list[int | None] = []

    def work() -> None:
        with StopRequest() as stop:
            stop.request(signal.SIGINT)
            seen.append(stop.signal_number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIGINT]


STUBBORN = """
import os, signal
from cvm_translator.training.signals import StopRequest
with StopRequest() as stop, stop.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never said", flush=True)
"""


def test_a_second_signal_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "still here\n", "")
