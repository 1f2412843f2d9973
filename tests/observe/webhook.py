"""A real HTTP server on this machine that takes alerts, or does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WebhookServer:
    """Answers with the codes in `answers` in turn, then with 200; an answer may be a function that does it itself."""

    def __init__(self, path: str = "/hook") -> None:
        self.answers: list[int | Callable[[BaseHTTPRequestHandler], None]] = []
        self.taken: list[dict[str, Any]] = []
        """Alerts that were answered with 200."""
        self.num_requests = 0
        self.headers: dict[str, str] = {}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.num_requests += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = owner.answers.pop(0) if owner.answers else 200
                if not isinstance(answer, int):
                    answer(self)
                    return
                if answer == 200:
                    owner.taken.append(json.loads(body))
                    owner.headers = dict(self.headers)
                self.send_response(answer, "because of " + self.path)
                self.send_header("Location", f"http://127.0.0.1:{owner.port}{self.path}")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}{path}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def keys(self) -> list[str]:
        return [alert["key"] for alert in self.taken]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
