"""What `watch` answers to whom: raw requests over loopback, well-formed and not."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megahybrid.errors import MegahybridError
from megahybrid.report import http
from megahybrid.report.http import answers_to, host_name, server


class Pages:
    """A page that says whether it was drawn, and a state that fails where it is told to."""

    def __init__(self) -> None:
        self.drawn = 0
        self.error: Exception | None = None

    def page(self) -> str:
        self.drawn += 1
        return "<p>secret</p>"

    def state(self, after: str) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"version": after}


@contextmanager
def serving(host: str = "127.0.0.1") -> Iterator[tuple[int, Pages]]:
    pages = Pages()
    with server(pages, host, 0) as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield one.server_address[1], pages
        finally:
            one.shutdown()
            thread.join()


@pytest.fixture
def served(capfd: pytest.CaptureFixture) -> Iterator[tuple[int, Pages]]:
    """A server that says nothing on the terminal, whatever it is asked."""
    with serving() as found:
        yield found
    assert capfd.readouterr() == ("", "")


def ask(port: int, request: bytes, seconds: float = 20.0, end: bool = False) -> bytes:
    """What comes back until the server closes; `end` says that nothing more is sent."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        try:
            client.sendall(request)
            if end:
                client.shutdown(socket.SHUT_WR)
            while piece := client.recv(65536):
                found += piece
        except (ConnectionResetError, BrokenPipeError):
            pass  # closed before it had read all that was sent
    return found


def get(path: str, host: str, more: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode("latin-1")


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.8.9.10:1", "[::1]", "[::1]:9"],
)
def test_names_of_this_machine_are_answered(served: tuple[int, Pages], host: str) -> None:
    answer = ask(served[0], get("/", host))
    assert status(answer) == 200 and answer.endswith(b"<p>secret</p>")
    head = answer.lower()
    for header in (b"x-content-type-options: nosniff", b"cache-control: no-store"):
        assert header in head


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8800", "127.0.0.1.evil.example", "localhost.evil.example",
        "evil-localhost", "0.0.0.0", "10.0.0.1", "[::2]", "169.254.169.254", "2130706433", "127.1",
    ],
)  # fmt: skip
def test_a_name_that_was_pointed_here_is_told_nothing(served: tuple[int, Pages], host: str) -> None:
    for path in ("/", "/live.json", "/other"):
        answer = ask(served[0], get(path, host))
        assert status(answer) == 403 and b"secret" not in answer
        assert answer.split(b"\r\n\r\n")[1].count(b"\n") == 1
    assert served[1].drawn == 0


OWN = "Host: 127.0.0.1\r\n"
BAD = {
    "no name of a host": ("GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (f"GET / HTTP/1.1\r\n{OWN}Host: evil.example\r\n\r\n", 400),
    "one host twice": (f"GET / HTTP/1.1\r\n{OWN}{OWN}\r\n", 400),
    "a host with a path": ("GET / HTTP/1.1\r\nHost: 127.0.0.1/evil\r\n\r\n", 400),
    "a host with a user": ("GET / HTTP/1.1\r\nHost: evil@127.0.0.1\r\n\r\n", 400),
    "a port of letters": ("GET / HTTP/1.1\r\nHost: 127.0.0.1:http\r\n\r\n", 400),
    "half an address of IPv6": ("GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
    "half an address as the target": (f"GET http://[ HTTP/1.1\r\n{OWN}\r\n", 400),
    "another server as the target": (f"GET http://evil.example/ HTTP/1.1\r\n{OWN}\r\n", 400),
    "HEAD": (f"HEAD / HTTP/1.1\r\n{OWN}\r\n", 405),
    "POST": (f"POST / HTTP/1.1\r\n{OWN}Content-Length: 9\r\n\r\n<p>hi</p>", 405),
    "OPTIONS": (f"OPTIONS * HTTP/1.1\r\n{OWN}\r\n", 405),
    "a method of our own": (f"answer / HTTP/1.1\r\n{OWN}\r\n", 405),
    "above the root": (f"GET /../../etc/passwd HTTP/1.1\r\n{OWN}\r\n", 404),
    "above the root, in escapes": (f"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n{OWN}\r\n", 404),
    "two slashes": (f"GET //etc/passwd HTTP/1.1\r\n{OWN}\r\n", 404),
    "a NUL": (f"GET /\0 HTTP/1.1\r\n{OWN}\r\n", 404),
    "a NUL in escapes": (f"GET /live.json%00 HTTP/1.1\r\n{OWN}\r\n", 404),
    "no version": ("GET /\r\n\r\n", 400),
    "a version of the future": (f"GET / HTTP/9.1\r\n{OWN}\r\n", 505),
    "a version of words": (f"GET / HTTP/one\r\n{OWN}\r\n", 400),
    "too many words": (f"GET / / / HTTP/1.1\r\n{OWN}\r\n", 400),
    "TLS": ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 abc\r\n\r\n", 400),
    "a long path": (f"GET /{'a' * 70_000} HTTP/1.1\r\n{OWN}\r\n", 414),
    "a long header": (f"GET / HTTP/1.1\r\n{OWN}X: {'a' * 70_000}\r\n\r\n", 431),
    "many headers": (f"GET / HTTP/1.1\r\n{OWN}" + "X: a\r\n" * 200 + "\r\n", 431),
    "a header folded": ("GET / HTTP/1.1\r\nHost:\r\n 127.0.0.1\r\n evil\r\n\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_is_not_ours_to_answer_is_refused(
    served: tuple[int, Pages], name: str
) -> None:
    request, expected = BAD[name]
    answer = ask(served[0], request.encode("latin-1"))
    assert b"Traceback" not in answer and b"secret" not in answer and served[1].drawn == 0
    if answer or expected not in (414, 431):  # reset: it had not read all of it
        assert status(answer) == expected
    assert status(ask(served[0], get("/", "localhost"))) == 200


def test_what_breaks_while_drawing_is_one_line(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as (port, pages):
        pages.error = MegahybridError("runs/“a”\x1b[31m/ledger.jsonl could not be read.", "More.")
        answer = ask(port, get("/live.json", "localhost"))
        assert status(answer) == 503
        told = answer.split(b"\r\n\r\n")[1].decode()
        assert told == "runs/“a”\\x1b[31m/ledger.jsonl could not be read.\n"
        assert capfd.readouterr() == ("", "")
        pages.error = RuntimeError("secret of\nthe code")
        answer = ask(port, get("/live.json", "localhost"))
        assert status(answer) == 500
        assert capfd.readouterr().err.count("\n") == 1


def test_one_who_asks_for_ever_is_cut_off_and_others_are_answered(
    served: tuple[int, Pages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 2.0)
    silent = []
    for begun in (b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", *[b""] * 6):
        silent.append(socket.create_connection(("127.0.0.1", served[0]), timeout=20))
        silent[-1].sendall(begun)
    assert status(ask(served[0], get("/", "localhost"))) == 200
    began = time.monotonic()
    answers = [client.recv(65536) for client in silent]
    assert time.monotonic() - began < 15
    assert status(answers[1]) == 408 and b"secret" not in b"".join(answers)
    for client in silent:
        client.close()


def test_one_who_sends_a_byte_now_and_then_is_cut_off(
    served: tuple[int, Pages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.5)
    until = time.monotonic() + 15
    with (
        socket.create_connection(("127.0.0.1", served[0]), timeout=20) as client,
        pytest.raises((ConnectionResetError, BrokenPipeError)),
    ):
        while time.monotonic() < until:
            client.sendall(b"a")
            time.sleep(0.05)


def test_more_connections_than_there_is_room_for_are_closed(
    served: tuple[int, Pages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 1.0)
    many = [
        socket.create_connection(("127.0.0.1", served[0]), timeout=20)
        for _ in range(http.MOST_CONNECTIONS + 8)
    ]
    assert many[-1].recv(1) == b""
    for client in many:
        client.close()
    until = time.monotonic() + 15
    while not (answer := ask(served[0], get("/", "localhost"))) and time.monotonic() < until:
        time.sleep(0.1)
    assert status(answer) == 200


def test_three_hundred_requests_of_noise_get_no_page_and_no_traceback(
    served: tuple[int, Pages], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(7)
    seeds = [request.encode("latin-1")[:400] for request, _ in BAD.values()]
    seeds.append(get("/live.json?after=1&after=2", "evil.example"))
    alphabet = [b"\r\n", b"\0", b"\xff", b":", b" ", b"[", b"%", b"\t", b"HTTP/1.1", b"Host: x"]
    for _ in range(300):
        request = bytearray(draw.choice(seeds))
        for _ in range(draw.randrange(1, 6)):
            place = draw.randrange(len(request) + 1)
            request[place : place + draw.randrange(3)] = draw.choice(alphabet)
        answer = ask(served[0], bytes(request), end=True)
        assert b"Traceback" not in answer
        if answer.startswith(b"HTTP/"):
            refused = 400 <= status(answer) < 500 or status(answer) == 505
            # Noise may hit upon a good request: then its host is ours.
            assert refused or b"127.0.0.1" in request
    assert status(ask(served[0], get("/", "localhost"))) == 200


def test_a_server_for_others_answers_to_addresses_and_its_own_names() -> None:
    answers = answers_to("0.0.0.0")
    assert all(map(answers, ("10.1.2.3", "::1", "localhost", socket.gethostname())))
    assert not answers("evil.example")
    assert answers_to("node7.cluster")("node7") and not answers_to("node7.cluster")("node8")


@pytest.mark.parametrize("host", ["", "a\tb", "[::1", "a:b", "x@y", "a/b", "a?b", "a#b", "::1"])
def test_what_is_no_host_has_no_name(host: str) -> None:
    assert not host_name(host)
