"""How a process that works for another one behaves."""

from __future__ import annotations

import os
import signal
import threading
import time

WATCH_SECONDS = 1.0


def follow(caller: int) -> None:
    """Leave the signals to the caller; leave when it is gone, which nobody else would tell a process that waits."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == caller:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
