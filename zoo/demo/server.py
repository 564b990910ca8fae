"""Serve the page and the answers of its panels by Python's own HTTP server: nothing to install or to load."""

from __future__ import annotations

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ...weights import WeightsError
from ..data.foreign import reason
from .panels import Panels

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 2 << 20  # of a request: a drawing of 512×512 numbers has 1 MB
# the page's own script and style, pictures that it was answered, and nothing from elsewhere
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /NAME with a JSON object the answer of a panel: its values, or `{"error": sentence}`."""

    server: DemoServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: requests hold drawings."""

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def do_GET(self) -> None:
        if self.path.split("?")[0] != "/":
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"there is no page {self.path}"})
            return
        self._send(HTTPStatus.OK, "text/html", PAGE.read_bytes())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MOST_BYTES:
            self.close_connection = True  # the body is not read
            self._send_json(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"a request has at most {MOST_BYTES} bytes"})
            return
        body = self.rfile.read(length)
        # a page from elsewhere cannot send this type without being asked, and it is not allowed to when it asks
        if self.headers.get_content_type() != "application/json":
            self._send_json(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "a request is application/json"})
            return
        try:
            chosen = json.loads(body or b"{}")
            if not isinstance(chosen, dict):
                raise ValueError("a request is a JSON object")
            answer = self.server.panels.answer(self.path.strip("/"), chosen)
        except (ValueError, FileNotFoundError, WeightsError) as error:  # those of JSON are ValueErrors
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": reason(error)})
            return
        self._send_json(HTTPStatus.OK, answer)


class DemoServer(ThreadingHTTPServer):
    """The server of the page; `panels` answer its requests."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], panels: Panels):
        self.panels = panels
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        """Address of the page."""
        host, port = self.server_address[:2]
        return f"http://{host if host not in ('0.0.0.0', '') else 'localhost'}:{port}/"  # pyright: ignore


def make_server(panels: Panels, *, host: str = "127.0.0.1", port: int = 0) -> DemoServer:
    """A server that is bound and waits for `serve_forever()`.

    Args:
        panels: what answers.
        host: address to listen at; 0.0.0.0 is every one of this machine, for a phone in the same network.
        port: 0: any that is free.

    Raises:
        OSError: the address is in use, or none of this machine.
    """
    return DemoServer((host, port), panels)
