"""The report of a run between sites: who was asked and answered, when, and what was dropped and why."""

import re
from pathlib import Path

from matplotlib.figure import Figure
from site_runs import between_sites, exchange, simulated

from fedrot.app.report.build import build_report
from fedrot.app.report.figures import save
from fedrot.app.report.load import load_runs
from fedrot.app.report.timeline import timeline
from fedrot.running.network.journal import FileJournal


def cells(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading."""
    table = page[page.index(heading) :].split("</table>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL) for row in table.split("<tr>")[2:]]


def test_the_page_says_what_each_client_sent_and_what_was_dropped(tmp_path: Path) -> None:
    run = between_sites(tmp_path)
    page = build_report([run], run).read_text()
    assert cells(page, "Between sites, in")[0] == [
        *("books", "5", "5", "8 MB", "4 MB", "1.5 kB", "2", "2", "2026-01-05 12:00:27", "0"),
    ]
    assert cells(page, "Between sites, in")[3][-4:] == ["-", "-", "never", "0"]
    assert "16 MB down to the clients, 6 MB up, on average 2.67 MB and 1 MB a round and client" in page
    assert "Headers took 3.35 kB" in page
    assert cells(page, "<summary>by round")[2] == ["1", "4", "3", "8 MB", "2 MB", "1.05 kB"]
    escaped = "&lt;script&gt;document.title = &#39;taken&#39;&lt;/script&gt;"
    assert cells(page, "Dropped or refused, in") == [
        ["outside", "2026-01-05 12:00:05", "poems", "join", "gave no answer"],
        ["1", "2026-01-05 12:00:22", "films", "upload", escaped],
        ["1", "2026-01-05 12:00:25", "music", "upload", "gave no answer"],
    ]
    assert "<script" not in page
    assert "Uploads dropped" not in page  # the list above has them
    assert (run / "figures" / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_simulation_has_no_such_section(tmp_path: Path) -> None:
    run = simulated(tmp_path)
    page = build_report([run], run).read_text()
    assert "Between sites" not in page
    assert not (run / "figures" / "timeline.png").exists()


def test_the_timeline_draws_every_exchange(tmp_path: Path) -> None:
    run = between_sites(tmp_path)
    FileJournal(run).add(
        exchange("$\\frac{$ <b>", "train", 1, 26)
    )  # a name that is no formula, though it looks like one
    figure: Figure = timeline(load_runs([run])[0])
    save(figure, tmp_path / "timeline.png")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["$\\frac{$ <b>", "books", "films", "music", "poems"]
    bars = sum(len(found.get_paths()) for found in ax.collections)
    assert bars == 13
    (crosses,) = ax.lines
    assert sorted(crosses.get_ydata()) == [2, 3, 4]
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"join", "train", "evaluate"}


def test_the_stages_of_a_secure_sum_are_one_kind_in_the_timeline(tmp_path: Path) -> None:
    run = between_sites(tmp_path)
    for number, stage in enumerate(("share", "masked", "unmask", "later version's")):
        FileJournal(run).add(exchange("books", stage, 1, 26 + number))
    named = [text.get_text() for text in timeline(load_runs([run])[0]).legends[0].get_texts()]
    assert named.count("secure sum") == 1
    assert named.count("other") == 1
    assert not {"share", "masked", "unmask"} & set(named)
