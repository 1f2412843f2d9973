"""What a service manager is told, by systemd's datagram protocol (sd_notify), in a few lines of our own.

Without NOTIFY_SOCKET in the environment nothing is sent. A message that cannot be delivered is lost: it never fails the
run. Watchdog pings are asked for by the caller, who sends them only while the trainer's heartbeat is healthy.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""The supervisor's own: never handed on to the trainer."""
STATUS_EVERY_SECONDS = 5.0


class Notifier:
    """Speaks to the socket that `environment` names."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]  # a socket in the abstract namespace
        self._watchdog_seconds = _watchdog_seconds(environment)
        self._last_ping = float("-inf")
        self._last_status = (float("-inf"), "")

    def send(self, *lines: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1.0)
            sender.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)

    def status(self, text: str) -> None:
        """A line for `systemctl status`, now and then."""
        now, (at, last) = time.monotonic(), self._last_status
        if text != last and now - at >= STATUS_EVERY_SECONDS:
            self._last_status = (now, text)
            self.send(f"STATUS={text}")

    def ping(self) -> None:
        """Tell the watchdog that all is well, twice as often as it asks for."""
        now = time.monotonic()
        if self._watchdog_seconds is not None and now - self._last_ping >= self._watchdog_seconds / 2:
            self._last_ping = now
            self.send("WATCHDOG=1")


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        seconds = int(environment.get("WATCHDOG_USEC", "")) / 1e6
    except ValueError:
        return None
    return seconds if seconds > 0 else None
