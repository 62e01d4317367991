"""`fedrot status`: how a run stands, from its folder alone, between sites and in a simulation."""

import json
import os
from pathlib import Path

import pytest
from site_runs import SCRIPT, START, append, between_sites, exchange, record, simulated

from fedrot.app.cli.main import main
from fedrot.app.cli.status import last_run
from fedrot.app.live.summary import Client, by_round, clients, dropped, read_summary
from fedrot.app.live.words import ago, moment, size
from fedrot.running.network.journal import FileJournal, read_exchanges


def words(text: str, first: str) -> list[str]:
    """The words of the line that begins with `first`."""
    return next(line for line in text.splitlines() if line.split()[:1] == [first]).split()


def test_a_run_between_sites_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(between_sites(tmp_path / "run"))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny  fedrot  2 of 4 rounds  changed 0 s ago\n")
    assert "round 1  1 used  2 dropped  loss 0.7000  validation accuracy 0.6000 (worst client 0.4000)" in out
    heads, *rows = (line for line in out.splitlines() if line.split()[:1] in (["client"], ["books"], ["poems"]))
    assert heads.split()[:3] == ["client", "asked", "answered"]
    assert [row.split()[:9] for row in rows] == [
        ["books", "5", "5", "8", "MB", "4", "MB", "1.5", "kB"],
        ["poems", "1", "0", "0", "B", "0", "B", "200", "B"],
    ]
    assert words(out, "books")[-1] == "heard"
    assert f"refused: {SCRIPT}" in out
    assert "silent: gave no answer" in out
    assert "never heard: gave no answer" in out
    last = [line.split() for line in out[out.index("dropped or refused") :].splitlines()[2:]]
    assert [(line[0], line[4], line[5]) for line in last] == [
        ("-", "join", "poems"),
        ("1", "upload", "films"),
        ("1", "upload", "music"),
    ]


def test_a_simulation_and_a_server_that_still_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = simulated(tmp_path / "runs" / "one")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(2, books="its loss is nan")) + "\n")
    assert main(["status"]) == 0  # the run in runs/ that changed last
    out = capsys.readouterr().out
    assert "3 of 4 rounds" in out
    assert "asked" not in out
    assert words(out, "2") == ["2", "-", "upload", "books", "its", "loss", "is", "nan"]

    deep = simulated(tmp_path / "runs" / "demo" / "fedrot", rounds=1)
    os.utime(deep / "metrics.jsonl", (2e9, 2e9))
    assert last_run(Path("runs")) == Path("runs/demo/fedrot")  # as `make demo` leaves it

    waits = tmp_path / "waits"
    waits.mkdir()
    (waits / "sites.json").write_text('{"run": "abc", "clients": ["b", "a"]}')
    assert main(["status", str(waits)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("waits  waits for its clients  0 rounds")
    assert words(out, "a")[-2:] == words(out, "b")[-2:] == ["never", "heard"]


def test_follow_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = between_sites(tmp_path / "run")
    (run / "result.json").write_text("{}")
    assert main(["status", str(run), "--follow"]) == 0
    assert "tiny  fedrot  2 of 4 rounds  finished" in capsys.readouterr().out


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    damaged = simulated(tmp_path / "damaged")
    (damaged / "sites.json").write_text('{"clients": {"a": 1}}')
    short = tmp_path / "short"
    short.write_text("1234\n")
    for call, said in (
        ([], "give a run folder"),
        (["nothing"], "nothing: no such run folder"),
        ([str(tmp_path)], "not a run folder, it has no recipe.yaml"),
        ([str(damaged)], "sites.json: clients must be a list of names"),
        ([str(damaged), "--port", "80"], "--port goes with --serve"),
        ([str(damaged), "--follow", "--serve"], "not allowed with argument"),
        ([str(simulated(tmp_path / "run")), "--serve", "--host", "0.0.0.0"], "--token-file"),
        ([str(tmp_path / "run"), "--serve", "--token-file", str(short)], "short: a token is at least 16"),
        ([str(tmp_path / "run"), "--serve", "--port", "70000"], "port 70000"),
    ):
        assert main(["status", *call]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert said in err


def test_what_clients_wrote_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = between_sites(tmp_path / "run")
    evil = "\x1b[2J\x9b1mgone\r\n\u202edrawkcab\x07" + "a" * 9999
    FileJournal(run).add(exchange("ev\x1b]0;il\nname", "train", 2, 30, evil))
    append(run, 2, 0.5)
    assert main(["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "ev]0;il name" in out
    assert "[2J1mgone drawkcabaaa" in out
    assert all(character.isprintable() or character == "\n" for character in out)
    assert max(map(len, out.splitlines())) < 800


def of(name: str, *arguments: object) -> Client:
    return next(one for one in clients(*arguments) if one.name == name)  # type: ignore[arg-type]


def test_a_clients_state_is_that_of_its_last_exchange_or_what_the_server_said_of_its_upload() -> None:
    train = exchange("a", "train", 0, 1)
    checked = [record(0, a="upload: layer x holds NaN")]
    assert of("a", [record(0)], [train], []).state == "heard"
    after = of("a", checked, [train, exchange("a", "evaluate", 1, 2)], [])
    assert (after.state, after.reason, after.dropped) == ("refused", "upload: layer x holds NaN", 1)
    assert of("a", checked, [train, exchange("a", "train", 1, 3)], []).state == "heard"
    assert of("a", [], [train, exchange("a", "train", 1, 3, "gave no answer", answered=False)], []).state == "silent"
    assert of("a", [], [exchange("a", "join", None, 3, "gave no answer", answered=False)], []).last_heard is None
    times = [exchange("a", "train", i, i, seconds=s) for i, s in enumerate((1.0, 9.0, 2.0))]
    lost = exchange("a", "train", 3, 3, "gave no answer", answered=False, seconds=60.0)
    found = of("a", [], [*times, lost], [])
    assert (found.median, found.longest, found.last_heard) == (2.0, 9.0, START + 2)


def test_an_upload_that_was_dropped_and_the_exchange_that_says_why_are_one() -> None:
    exchanges = [
        exchange("a", "join", None, 1, "other labels", answered=True),
        exchange("b", "train", 0, 2, "it is full"),  # a try before the server was started again
        exchange("b", "train", 0, 4, "it is full"),
        exchange("c", "train", 0, 5),
        exchange("c", "answer", 0, 6, "no memory"),
        exchange("c", "evaluate", 1, 7, "no file"),
        exchange("d", "train", 0, 8),
    ]
    reasons = {
        "a": "other labels",
        "b": "it is full",
        "c": "second phase: answer: no memory",
        "d": "holds NaN",
        "e": "x",
    }
    found = dropped([record(0, **reasons)], exchanges)
    assert [(one.client, one.kind, one.round, one.time and one.time - START) for one in found] == [
        ("a", "upload", 0, 1),
        ("b", "train", 0, 2),
        ("b", "upload", 0, 4),
        ("c", "upload", 0, 6),
        ("c", "evaluate", 0, 7),
        ("d", "upload", 0, 8),
        ("e", "upload", 0, 8),  # never asked: when the others were through
    ]
    assert [one.time for one in dropped([record(0, **reasons)], [])] == [None] * 5


def test_traffic_by_round_counts_headers_apart(tmp_path: Path) -> None:
    found = dict(by_round(read_exchanges(between_sites(tmp_path))))
    assert list(found) == [None, 0, 1]
    assert (found[0].requests, found[0].answered, found[0].headers) == (4, 4, 1200)
    assert (found[1].answered, found[1].down, found[1].up) == (3, 8_000_000, 2_000_000)
    assert found[None].down == found[None].up == 0
    total = [one.traffic for one in read_summary(tmp_path).clients]
    assert sum(one.headers for one in total) == sum(one.headers for one in found.values())


def test_sizes_and_times_in_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_600, 1.5e9, 2e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1 MB",
        "1.5 GB",
        "2000 GB",
    ]
    assert [ago(s) for s in (-3, 119, 121, 7300, 9e5)] == [
        "0 s ago",
        "119 s ago",
        "2 min ago",
        "2 h ago",
        "10 days ago",
    ]
    assert moment(START) == "2026-01-05 12:00:00"
