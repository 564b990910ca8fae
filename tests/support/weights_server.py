"""A server on loopback that misbehaves as told, and a process that asks it, for the tests of `foveal.weights`."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from foveal.weights import Manifest, Transfer, WeightsError, fetch, load_manifest

QUICK = Transfer(timeout=60, attempts=2, backoff=0.01, loopback_http=True)


@dataclass
class Resource:
    """One file on the server, and how the server treats those who ask for it."""

    content: bytes
    ranges: bool = True
    etag: str | None = '"one"'
    headers: dict[str, str] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)  # answered first, one a request
    cuts: list[int] = field(default_factory=list)  # close the connection after so many bytes, one a request
    stall_after: int | None = None  # send so many bytes, then wait for `go_on`
    go_on: threading.Event = field(default_factory=threading.Event)
    claimed_length: int | None = None
    send_length: bool = True
    redirect: str | None = None


@dataclass
class Origin:
    """The server's files and what was asked of it."""

    url: str
    resources: dict[str, Resource] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    body_bytes: int = 0

    def add(self, path: str, content: bytes, **behaviour) -> Resource:
        self.resources[path] = Resource(content, **behaviour)
        return self.resources[path]

    @property
    def gets(self) -> int:
        return sum(method == "GET" for method, _, _ in self.requests)


@contextlib.contextmanager
def serve(context=None) -> Iterator[Origin]:
    """Runs a server on a free port of 127.0.0.1; with an `ssl.SSLContext` it speaks https."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    scheme = "http" if context is None else "https"
    server.origin = Origin(f"{scheme}://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.origin  # type: ignore[attr-defined]
    finally:
        for resource in server.origin.resources.values():  # type: ignore[attr-defined]
            resource.go_on.set()
        server.shutdown()
        server.server_close()


def write_manifest(path: Path, *mirrors: dict, name: str = "natten_test_m.tag", **fields) -> Manifest:
    """A manifest file with one entry; absent fields of a mirror are filled in."""
    defaults = {"format": "official", "file": "model.safetensors"}
    entry = {"license": "MIT", "source": "https://example.org", "img_size": 32, "num_classes": 10} | fields
    entry["mirrors"] = [defaults | mirror for mirror in mirrors]
    path.write_text(json.dumps({name: entry}))
    return load_manifest(path)


def fetch_in_a_process(answers, environment, manifest, names, limit, unprivileged):
    """What a process of the tests does: fetches, and sends the path or the error message of each name.

    `limit` is the size in bytes beyond which it cannot write a file, or 0; `unprivileged` turns root into nobody.
    """
    os.environ.update(environment)
    if limit:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if unprivileged and os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    entries = load_manifest(manifest)
    answers.send("ready")
    for name in names:
        try:
            answers.send(f"path {fetch(name, manifest=entries, transfer=QUICK)}")
        except WeightsError as error:
            answers.send(f"error {error}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # the client was killed, or refused the certificate
            super().handle()

    def _answer(self, *, body: bool) -> None:
        origin: Origin = self.server.origin  # type: ignore[attr-defined]
        origin.requests.append((self.command, self.path, self.headers.get("Range")))
        resource = origin.resources.get(self.path)
        if resource is None:
            return self._status(404)
        if body and resource.statuses:
            return self._status(resource.statuses.pop(0), **resource.headers)
        if resource.redirect is not None:
            return self._status(302, Location=resource.redirect)
        start = self._start(resource)
        if start > 0 and start >= len(resource.content):
            return self._status(416, **{"Content-Range": f"bytes */{len(resource.content)}"})
        self._send(origin, resource, start, body=body)

    def _start(self, resource: Resource) -> int:
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if not resource.ranges or wanted is None or (condition is not None and condition != resource.etag):
            return 0
        return int(wanted.removeprefix("bytes=").rstrip("-"))

    def _send(self, origin: Origin, resource: Resource, start: int, *, body: bool) -> None:
        content = resource.content[start:]
        whole = len(resource.content)
        headers = {"ETag": resource.etag} if resource.etag else {}
        if self.headers.get("Range") and resource.ranges and start:
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        if resource.send_length:
            headers["Content-Length"] = str(resource.claimed_length or len(content))
        self.close_connection = True
        self.send_response(206 if "Content-Range" in headers else 200)
        for key, value in (headers | {"Connection": "close"} | resource.headers).items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        end = resource.cuts.pop(0) if resource.cuts else len(content)
        stall = min(end, end if resource.stall_after is None else resource.stall_after)
        self._write(origin, content[:stall])
        if stall < end:
            resource.go_on.wait(30)
            self._write(origin, content[stall:end])

    def _write(self, origin: Origin, part: bytes) -> None:
        origin.body_bytes += len(part)
        self.wfile.write(part)
        self.wfile.flush()

    def _status(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
