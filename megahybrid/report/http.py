"""The server behind `watch`: two pages for GET, for those who name this machine, and nothing else.

A browser that shows somebody's page can be made to ask this server: by a name that was pointed at
127.0.0.1 afterwards (DNS rebinding) the answer would be that page's to read. It is the `Host` of a
request that tells; a name that is not ours is answered with 403.
"""

import contextlib
import errno
import ipaddress
import json
import socket
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, runtime_checkable
from urllib.parse import parse_qs, urlsplit

from megahybrid.errors import ConfigError, MegahybridError, first_line, tell
from megahybrid.printable import printable

REQUEST_SECONDS = 10.0  # the longest that one may take to ask
ANSWER_SECONDS = 60.0  # the longest that one may take to read an answer
MOST_CONNECTIONS = 64  # at once; a page holds one


@runtime_checkable
class Pages(Protocol):
    """The page that is served, and its changes."""

    def page(self) -> str:
        """The whole page."""
        ...

    def state(self, after: str) -> dict[str, Any]:
        """Return what has changed since version `after`."""
        ...


def server(pages: Pages, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is bound and not yet serving. Raises ConfigError for a port that is taken."""
    try:
        return _Server((host, port), pages)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port={port} is taken by another program on {host}. "
                "Name another one, or 0 for any that is free."
            ) from None
        raise ConfigError(
            f"--host={host} --port={port} cannot be listened on ({error.strerror or error}). "
            "Use 127.0.0.1 and a port above 1023."
        ) from None
    except OverflowError:
        raise ConfigError(f"--port={port} is no port. Use 0 to 65535.") from None


def is_loopback(name: str) -> bool:
    """Return True for a name or an address that always means the machine that says it."""
    if name.lower().removesuffix(".") == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False


def host_name(host: str) -> str | None:
    """The name in a `Host` header, without its port and without the brackets of an IPv6 address;
    None where it is not written as one."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018 (it is read to be checked)
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host else None


def answers_to(listening: str) -> Callable[[str], bool]:
    """Return the names that a server at the address `listening` answers to: those of loopback; and
    where it listens to other machines, any address, its own name and this machine's."""
    if is_loopback(listening):
        return is_loopback
    own = {name.lower() for name in (listening, socket.gethostname())}
    own |= {name.split(".")[0] for name in own}

    def answers(name: str) -> bool:
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True  # a page of somebody else's has a name
        return name.lower() in own or is_loopback(name)

    return answers


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    timeout = ANSWER_SECONDS
    default_request_version = "HTTP/1.0"  # HTTP/0.9 would hear a refusal as a page

    def setup(self) -> None:
        super().setup()
        self._late = False
        # One who sends a byte now and then does not hold the connection for ever.
        self._deadline = threading.Timer(REQUEST_SECONDS, self._hang_up)
        self._deadline.daemon = True
        self._deadline.start()

    def finish(self) -> None:
        self._deadline.cancel()
        super().finish()

    def _hang_up(self) -> None:
        self._late = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def parse_request(self) -> bool:
        """Reads the head of a request, and answers one that is not for us."""
        if not super().parse_request():
            return False
        self._deadline.cancel()
        refusal = self._refusal()
        if refusal is not None:
            self.send_error(*refusal)
        return refusal is None

    def _refusal(self) -> tuple[HTTPStatus, str] | None:
        if self._late:
            return HTTPStatus.REQUEST_TIMEOUT, "The request did not end."
        hosts = self.headers.get_all("Host", [])
        name = host_name(hosts[0].strip()) if len(hosts) == 1 else None
        if name is None:
            return HTTPStatus.BAD_REQUEST, "A request says once which host it is for."
        if not self.server.answers_to(name):
            return HTTPStatus.FORBIDDEN, (
                "This page is for its own machine. Open http://127.0.0.1 with its port."
            )
        if self.command != "GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, "This page can be read, with GET, only."
        if not self.path.startswith("/"):
            return HTTPStatus.BAD_REQUEST, "A path begins with a slash."
        return None

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        draw = {"/": self._page, "/live.json": self._state}.get(path)
        if draw is None:
            self.send_error(HTTPStatus.NOT_FOUND, "There is / here, and nothing else.")
            return
        try:
            answer = draw(query)
        except MegahybridError as error:
            # A ledger that is being replaced, say: the page tries again.
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, first_line(error))
        except Exception as error:
            # A file that no check foresaw must not take the page from a run that goes on.
            words = f"The page cannot be drawn ({type(error).__name__}: {first_line(error)})."
            tell(printable(words))
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, words)
        else:
            self._answer(*answer)

    def _page(self, _: str) -> tuple[str, str]:
        return "text/html; charset=utf-8", self.server.pages.page()

    def _state(self, query: str) -> tuple[str, str]:
        try:
            after = parse_qs(query, max_num_fields=4).get("after", [""])[0]
        except ValueError:
            after = ""
        state = self.server.pages.state(after)
        return "application/json", json.dumps(state, allow_nan=False)

    def _answer(self, kind: str, text: str, status: int = HTTPStatus.OK) -> None:
        body = text.encode(errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a line of text; the base class would put what it was asked into a page."""
        line = printable(message or HTTPStatus(code).phrase)
        self.close_connection = True
        self._answer("text/plain; charset=utf-8", line + "\n", code)

    def version_string(self) -> str:
        return "megahybrid"

    def log_message(self, *_: Any) -> None:
        """Log nothing: the terminal is the user's."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, address: tuple[str, int], pages: Pages) -> None:
        self.pages = pages
        self.answers_to = answers_to(address[0])
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The base class would look up its own name, which may take seconds without a network.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def verify_request(self, *_: Any) -> bool:
        """Accept a connection while there is room for one more; others are closed."""
        return self._free.acquire(blocking=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, *_: Any) -> None:
        """A client that went away is nothing; the rest is a line, for a traceback helps nobody."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            tell(printable(f"a request failed ({type(error).__name__}: {first_line(error)})."))
