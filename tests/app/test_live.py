"""The page that shows how a run stands: what it answers and to whom, and what a browser makes of it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from site_runs import SCRIPT, append, between_sites, exchange, simulated

from fedrot.app.live import page
from fedrot.app.live.page import serve_page
from fedrot.core.errors import RunError
from fedrot.running.network.journal import FileJournal

TOKEN = "0123456789abcdef-token"


def ask(url: str, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of an answer."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def patiently(url: str) -> int:
    """The status of an answer; a place that is just being given back may not be free yet."""
    for _ in range(50):
        try:
            return ask(url)[0]
        except (http.client.RemoteDisconnected, ConnectionResetError):
            time.sleep(0.1)
    return 0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return between_sites(tmp_path / "run")


@pytest.fixture
def url(run: Path) -> Iterator[str]:
    with serve_page(run) as url:
        yield url


def test_two_paths_are_answered_and_nothing_else(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")
    status, headers, html = ask(url)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"<title>fedrot</title>" in html
    status, headers, content = ask(url, "/status.json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
    assert headers["Server"] == "fedrot"
    told = json.loads(content)
    assert [one["name"] for one in told["clients"]] == ["books", "films", "music", "poems"]
    assert (told["planned"], len(told["rounds"]), told["dropped_total"]) == (4, 2, 3)
    for path in (
        "/recipe.yaml",
        "/../recipe.yaml",
        "/..%2frecipe.yaml",
        "//etc/passwd",
        "/status.json/",
        "/page.html",
        "*",
    ):
        assert ask(url, path)[0] == 404, path
    status, headers, content = ask(url, "/status.json", "HEAD")
    assert (status, content) == (200, b"")
    assert int(headers["Content-Length"]) > 1000
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "BREW"):
        status, headers, _ = ask(url, "/status.json", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD"), method


def test_the_policy_lets_nothing_run_but_the_page_itself(url: str) -> None:
    _, headers, html = ask(url)
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind])
    assert not re.search(rb"""(src|href)=["'](?!data:)|innerHTML|insertAdjacent|document\.write|\son\w+=""", html)


def test_a_name_that_was_made_to_lead_here_is_refused(url: str) -> None:
    port = urlsplit(url).port
    for host in ("localhost", f"localhost:{port}", "LOCALHOST:1", "127.0.0.1", "127.8.8.8:9", "[::1]:80", "[::1]"):
        assert ask(url, "/status.json", Host=host)[0] == 200, host
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "192.168.0.1",
        "",
        "localhost:80:80",
    ):
        assert ask(url, "/status.json", Host=host)[0] == 403, host
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"GET /status.json HTTP/1.0\r\n\r\n")
        assert b" 403 " in plain.recv(100)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as double:
        double.sendall(b"GET /status.json HTTP/1.0\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert b" 403 " in double.recv(100)


def test_with_a_token_nothing_is_answered_without_it(run: Path) -> None:
    with serve_page(run, "0.0.0.0", token=TOKEN) as url:
        here = url.replace("0.0.0.0", "127.0.0.1")
        bearer = f"Bearer {TOKEN}"
        for path in ("/", "/status.json"):
            assert ask(here, path, Authorization=bearer)[0] == 200
            assert ask(here, f"{path}?token={TOKEN}", Host="runs.example")[0] == 200
            for wrong in ("", "?token=", f"?token={TOKEN}x", f"?token={TOKEN[:-1]}", "?token=%ff", f"?x={TOKEN}"):
                status, _, content = ask(here, path + wrong)
                assert status == 403, wrong
                assert b"books" not in content
            for wrong in ("Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"{bearer}\xe9"):
                assert ask(here, path, Authorization=wrong)[0] == 403, wrong
        assert ask(here, "/nothing")[0] == 403
        assert ask(here, "/nothing", Authorization=bearer)[0] == 404


def test_an_address_that_others_can_reach_wants_a_token(run: Path) -> None:
    for host in ("0.0.0.0", "", "::"):
        with pytest.raises(RunError, match="needs a token"), serve_page(run, host):
            pass
    for token in ("short", "a token with blanks in it", "", "0123456789abcdef?&"):
        with pytest.raises(RunError, match="at least 16"), serve_page(run, token=token):
            pass
    with (
        serve_page(run) as url,
        pytest.raises(RunError, match="choose another"),
        serve_page(run, port=urlsplit(url).port or 0),
    ):
        pass


def test_a_run_that_has_not_begun_or_is_damaged_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with serve_page(run) as url:
        status, _, content = ask(url, "/status.json")
        assert status == 503
        assert "no run in the folder yet" in json.loads(content)["problem"]
        assert str(tmp_path) not in content.decode()
        simulated(run)
        assert len(json.loads(ask(url, "/status.json")[2])["rounds"]) == 2
        whole = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text("{]\n" + whole)
        assert ask(url, "/status.json")[0] == 503
        (run / "metrics.jsonl").write_text(whole)
        append(run, 2, 0.7)
        assert len(json.loads(ask(url, "/status.json")[2])["rounds"]) == 3


def test_readers_that_say_nothing_do_not_hold_the_others_up_for_ever(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_READERS", 2)
    monkeypatch.setattr(page._Handler, "timeout", 0.5)
    with serve_page(run) as url:
        place = ("127.0.0.1", urlsplit(url).port or 0)
        with socket.create_connection(place, 10) as one, socket.create_connection(place, 10) as two:
            with socket.create_connection(place, 10) as third:
                assert third.recv(1) == b""  # there is no room for it
            assert one.recv(1) == two.recv(1) == b""  # patience with them is over
        assert patiently(url) == 200


def test_the_command_serves_until_it_is_interrupted(run: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    words = ["status", str(run), "--serve", "--token-file", str(tmp_path / "token")]
    with subprocess.Popen(
        [sys.executable, "-m", "fedrot.app.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        try:
            url = line.split()[0]
            assert ask(url, "/status.json")[0] == 403
            assert ask(url, "/status.json", Authorization=f"Bearer {TOKEN}")[0] == 200
        finally:
            os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
        assert TOKEN not in line


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright
    from test_browser import CHROMIUM  # skips where there is none

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


def test_the_page_keeps_up_with_the_run_and_obeys_no_client(browser: Any, run: Path) -> None:
    name = "<img src=https://evil.example/x onerror=\"document.title='taken'\">"
    FileJournal(run).add(exchange(name, "train", 1, 26, SCRIPT))
    tab = browser.new_page()
    problems: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda problem: problems.append(str(problem)))
    tab.on("request", lambda request: asked.append(request.url))
    with serve_page(run, token=TOKEN) as url:
        tab.goto(f"{url}?token={TOKEN}")
        tab.wait_for_selector("#clients:not([hidden])")
        clients = tab.eval_on_selector_all("#clients td:first-child", "all => all.map(n => n.textContent)")
        assert clients == [name, "books", "films", "music", "poems"]
        states = tab.eval_on_selector_all("#clients td:nth-child(2)", "all => all.map(n => n.textContent)")
        assert states[1:] == ["heard", f"refused: {SCRIPT}", "silent: gave no answer", "never heard: gave no answer"]
        assert SCRIPT in tab.inner_text("#dropped tbody tr:first-child")  # the last one first
        assert tab.inner_text("#state").startswith("fedrot, 2 of 4 rounds, changed")
        assert "validation accuracy 0.6000" in tab.inner_text("#last")
        line = "document.querySelector('#chart polyline').points.numberOfItems"
        assert tab.evaluate(line) == 2
        append(run, 2, 0.75)
        tab.wait_for_selector("#state:has-text('3 of 4 rounds')", timeout=10_000)
        assert tab.evaluate(line) == 3
        assert "0.7500" in tab.inner_text("#most")
        assert tab.title() == "tiny: 3/4, fedrot"
        assert tab.query_selector_all("main img, main script") == []
        assert problems == []
        assert {urlsplit(each).netloc for each in asked if not each.startswith("data:")} == {urlsplit(url).netloc}
    tab.wait_for_selector("#problem:not([hidden])", timeout=10_000)
    assert "no longer up to date" in tab.inner_text("#problem")
    assert tab.inner_text("#state").startswith("fedrot, 3 of 4 rounds")
    tab.close()


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_the_page_is_readable(browser: Any, url: str, width: int, scheme: str) -> None:
    from test_browser import LOWEST_CONTRAST

    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.goto(url)
    tab.wait_for_selector("#clients:not([hidden])")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    contrast, text = tab.evaluate(LOWEST_CONTRAST)
    assert contrast >= 4.5, text
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark.removeprefix("rgb(").removesuffix(")").split(","))) < 200) == (scheme == "dark")
    tab.close()
