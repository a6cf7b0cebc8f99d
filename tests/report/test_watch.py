"""`megahybrid watch`: the page follows a run that goes on, for this machine alone."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from megahybrid.cli import main
from megahybrid.ledger import EventLine, read_ledger
from megahybrid.train.ledger import LedgerWriter
from tests.report.browser import requests, show, wait
from tests.report.synthetic_run import BATCH, write_run
from tests.train.listeners.example import step_line


@contextmanager
def watching(run: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The command in a process of its own, on a free port."""
    command = [sys.executable, "-m", "megahybrid", "watch", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", told)
        assert found, (told, process.stderr and process.stderr.read())
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


def test_the_page_follows_the_run_without_a_reload(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    with watching(run) as (address, process):
        show(browser, address)
        wait(browser, "return document.body.dataset.version")
        browser.execute_script("window.stays = 1; document.querySelector('details').open = true")
        points = "return document.querySelector('[data-figure=loss]').data[1].x.length"
        before = browser.execute_script(points)
        version = browser.execute_script("return document.body.dataset.version")
        attempt(run, 197, 199, "running")
        wait(browser, f"return document.body.dataset.version !== '{version}'")
        assert browser.execute_script(points) == before + 3
        assert "199 steps" in browser.find_element("tag name", "header").text
        assert browser.find_element("id", "live").text == "live · step 199"
        kept = "return [window.stays, document.querySelector('details').open]"
        assert browser.execute_script(kept) == [1, True]
        assert browser.get_log("browser") == []
        assert all(url.startswith(address) for url in requests(browser))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=40) == 0
        wait(browser, "return !document.getElementById('notice').hidden")
        assert "has gone" in browser.find_element("id", "notice").text


def attempt(run: Path, first: int, last: int, outcome: str) -> None:
    """Goes on with the run for some steps."""
    with LedgerWriter(run / "ledger.jsonl") as writer:
        tokens = read_ledger(run / "ledger.jsonl").steps[-1].tokens
        writer.write(EventLine(event="resume", step=first - 1, stage="long", tokens=tokens))
        for step in range(first, last + 1):
            writer.write(step_line(step, stage="long", tokens=step * BATCH, length=4096))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_ends_it_cleanly_while_a_page_waits(tmp_path: Path, number: int) -> None:
    run = write_run(tmp_path / "demo")
    with watching(run) as (address, process):
        assert b"</html>" in urlopen(address, timeout=30).read()
        with pytest.raises(HTTPError):
            urlopen(address + "../../etc/passwd", timeout=30)
        waiting = socket.create_connection(("127.0.0.1", int(address.split(":")[2].strip("/"))))
        waiting.sendall(b"GET /live.json?after=x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        os.kill(process.pid, number)
        assert process.wait(timeout=40) == 0
        assert process.stderr is not None and process.stderr.read() == ""
        waiting.close()


def test_a_taken_port_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "demo")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["watch", str(run), "--port", str(port)]) == 2
    assert f"--port={port} is taken by another program on 127.0.0.1." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "message"),
    [("0.0.0.0", "lets other machines read the run"), ("example.org", "lets other machines")],
)
def test_others_are_let_in_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture, host: str, message: str
) -> None:
    run = write_run(tmp_path / "demo")
    assert main(["watch", str(run), "--host", host]) == 2
    error = capsys.readouterr().err
    assert message in error and "--allow-others" in error and error.count("\n") == 1


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "could not be read" in capsys.readouterr().err
