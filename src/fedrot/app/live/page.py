"""A page that shows how a run stands and keeps itself up to date, read-only.

The server knows two paths and opens no other file than those of the summary. What clients wrote travels as JSON and
is put in the page as text; the page's policy (Content-Security-Policy) lets no script run but its own, by hash, and
lets nothing be asked of any other origin.
"""

import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fedrot.app.live.summary import FILES, Summary, read_summary
from fedrot.core.errors import FedrotError, RunError

_HTML = Path(__file__).with_name("page.html")
_SHORTEST = 16  # characters of a token
_DROPPED = 200  # at most so many of what was dropped are sent, the last ones
_READERS = 16  # connections at a time
_PATIENCE = 10.0  # seconds for a reader to say what it wants


@contextmanager
def serve_page(folder: Path, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> Iterator[str]:
    """Serve the page of a run folder from a thread while the context lasts; gives its address.

    The folder may still be without a run. Port 0 is any that is free. With a `token` every request must bring it, as
    `Authorization: Bearer TOKEN` or `?token=TOKEN`; an address that other machines can reach wants one. Raises
    `RunError` where it is missing or too short, or the address cannot be had.
    """
    if token is not None:
        check_token(token, "the token")
    try:
        server = _Server(folder, host, port, token)
    except (OSError, OverflowError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise RunError(
            f"a page cannot be served at {host} port {port}: {reason}; choose another port or host"
        ) from None
    with server:
        if token is None and not server.loopback:
            raise RunError(f"a page at {host} can be reached from other machines: it needs a token (--token-file FILE)")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def read_token(path: Path) -> str:
    """The token in a file, without the blank space around it. Raises `RunError`."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise RunError(f"{path}: not a text file; it must hold the token and nothing else") from None
    check_token(token, str(path))
    return token


def check_token(token: str, where: str) -> None:
    """Raise `RunError` for a token that could be guessed, or that an address cannot hold as it is."""
    if not re.fullmatch(rf"[A-Za-z0-9._~-]{{{_SHORTEST},}}", token):
        raise RunError(
            f"{where}: a token is at least {_SHORTEST} letters, digits or any of . _ ~ - (openssl rand -hex 24)"
        )


@dataclass(frozen=True)
class _Answer:
    """What lies at a path."""

    kind: str
    content: Callable[[], bytes]


class _Server(socketserver.ThreadingTCPServer):
    """A thread a request, some at a time."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, folder: Path, host: str, port: int, token: str | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.token = token
        self.loopback = ipaddress.ip_address(str(self.server_address[0])).is_loopback
        html = _HTML.read_bytes()
        self.answers = {
            "/": _Answer("text/html; charset=utf-8", lambda: html),
            "/status.json": _Answer("application/json", self._status),
        }
        self.policy = _policy(html.decode())
        self._folder, self._reading = folder, threading.Lock()
        self._summary: tuple[object, dict[str, Any]] | None = None
        self._places = threading.BoundedSemaphore(_READERS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hang up where there are too many readers: the run that this process may have is not to be starved."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one reader."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away is no error."""
        if not isinstance(sys.exception(), OSError):
            logging.getLogger("fedrot").exception("the page could not be served")

    def _status(self) -> bytes:
        """The summary as JSON, read again when a file of it has changed."""
        with self._reading:
            seen = _signature(self._folder)
            if self._summary is None or self._summary[0] != seen:
                self._summary = seen, values_of(read_summary(self._folder))
            return json.dumps({"now": time.time(), **self._summary[1]}, allow_nan=False).encode()


def values_of(summary: Summary) -> dict[str, Any]:
    """A summary as JSON holds it, with the last things that were dropped and the number of all."""
    values = asdict(summary)
    return {**values, "dropped": values["dropped"][-_DROPPED:], "dropped_total": len(summary.dropped)}


def _signature(folder: Path) -> list[tuple[int, int] | None]:
    """What changes when a file of the summary does."""
    found: list[tuple[int, int] | None] = []
    for name in FILES:
        try:
            state = (folder / name).stat()
            found.append((state.st_mtime_ns, state.st_size))
        except FileNotFoundError:
            found.append(None)
    return found


def _policy(html: str) -> str:
    """Content-Security-Policy: this page's own script and style, by their hashes, and questions to its own origin."""

    def own(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    allowed = [f"script-src {own('script')}", f"style-src {own('style')}", "img-src data:", "connect-src 'self'"]
    nothing = [f"{what} 'none'" for what in ("default-src", "base-uri", "form-action", "frame-ancestors")]
    return "; ".join(nothing + allowed)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: _Server
    timeout = _PATIENCE

    def do_GET(self) -> None:
        """The page, or its numbers."""
        path, _, query = self.path.partition("?")
        if self.server.loopback and not self._names_this_machine():
            self._send(403, "text/plain", b"this page is for this machine, by its own name\n")
        elif not self._brings_the_token(query):
            self._send(403, "text/plain", b"the token is missing, or it is another one\n")
        elif (answer := self.server.answers.get(path)) is None:
            self._send(404, "text/plain", b"there is nothing here\n")
        else:
            try:
                self._send(200, answer.kind, answer.content())
            except (FedrotError, OSError):
                problem = "there is no run in the folder yet, or a file of it cannot be read: fedrot status says which"
                self._send(503, "application/json", json.dumps({"problem": problem}).encode())

    do_HEAD = do_GET  # noqa: N815 - the name is http.server's

    def _names_this_machine(self) -> bool:
        """A page of another site whose name was made to lead here (DNS rebinding) asks by that name."""
        hosts = self.headers.get_all("Host", [])
        name = re.sub(r":\d*$", "", hosts[0]).strip("[]").lower() if len(hosts) == 1 else ""
        try:
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _brings_the_token(self, query: str) -> bool:
        if self.server.token is None:
            return True
        scheme, _, header = self.headers.get("Authorization", "").partition(" ")
        given = [*parse_qs(query).get("token", []), *([header.strip()] if scheme.lower() == "bearer" else [])]
        return any(hmac.compare_digest(one.encode(), self.server.token.encode()) for one in given)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by http.server for what it cannot read, and for methods that there are none of here."""
        self._send(405 if code == 501 else code, "text/plain", b"only GET and HEAD are answered\n")

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", self.server.policy),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
            *([("Allow", "GET, HEAD")] if status == 405 else []),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def version_string(self) -> str:
        """Says no more of this machine than it must."""
        return "fedrot"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line would hold the token."""
