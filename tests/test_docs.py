"""The documentation's tables say what the code says, and its results come from the committed files."""

import re
import sys
from pathlib import Path

import pytest

from fedrot.core.methods import methods

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def table() -> dict[str, list[str]]:
    text = (ROOT / "docs" / "methods.md").read_text()
    lines = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {line[0].strip().strip("`"): [cell.strip() for cell in line[1:]] for line in lines}


def test_every_method_has_its_row() -> None:
    assert set(table()) == set(methods())


@pytest.mark.parametrize("name", methods())
def test_a_row_says_what_the_capabilities_say(name: str) -> None:
    sees, *_, refused = table()[name]
    has = methods()[name].capabilities
    assert sees == has.reduction
    words = [] if refused == "-" else refused.split(", ")
    assert words == [word for word in ("ranks", "opt", "variates", "merge") if word not in has.takes()]


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_results_page_comes_from_the_committed_files(tmp_path: Path) -> None:
    import results

    rows = results.read_csv(results.REPLAY)
    table = results.vader_table()
    assert table == (results.VADER / "table.md").read_text()
    text = results.page(rows, table)
    assert (ROOT / "docs" / "results.md").read_text() == text
    results.draw(rows, tmp_path / "replay.png")
    assert (tmp_path / "replay.png").stat().st_size > 10_000


def test_the_performance_page_comes_from_the_committed_figures(tmp_path: Path) -> None:
    import performance

    found = performance.read()
    assert (ROOT / "docs" / "performance.md").read_text() == performance.page(found)
    performance.draw(found, tmp_path / "performance.png")
    assert (tmp_path / "performance.png").stat().st_size > 10_000


def test_the_committed_replay_holds_what_it_must() -> None:
    import results

    rows = results.read_csv(results.REPLAY)
    assert {row["task"] for row in rows} == {"vader", "trec"}
    assert {row["optimizer"] for row in rows} == {"adamw", "sgd"}
    assert {row["rank"] for row in rows} == {"4", "64"}
    assert {row["start"] for row in rows} == {"common", "own"}
    for start in ("common", "own"):
        for column in results.columns(rows):
            floors = results.values(rows, start, column, "floor")
            assert results.values(rows, start, column, "fedrot_svd") == pytest.approx(floors, abs=1e-4)
            best = results.values(rows, start, column, "best rotation")
            found = results.values(rows, start, column, "consensus")
            for mine, least in zip(found, best, strict=True):
                if least < 0.99:  # where rotation is a cause at all
                    assert (1 - mine) / (1 - least) >= 0.9, (start, column)


def test_the_replay_runs_at_reduced_size(tmp_path: Path) -> None:
    import recorded
    import replay
    from fedrot.learning.fetch import fetch

    for name in ("vader", "minilm"):
        fetch(name)
    setting = recorded.Setting("vader", "adamw", 2, "own", 0)
    recorded.RATES[("adamw", 2)] = 1e-3
    rows = list(replay.measure([setting], None, steps=1))
    variants = {row[6] for row in rows}
    assert {*replay.VARIANTS, "floor", "best rotation"} == variants
    ratio = {row[6]: float(row[8]) for row in rows}
    assert ratio["fedex"] < 1e-4
    assert ratio["fedrot_svd"] == pytest.approx(ratio["floor"], abs=1e-5)
    assert ratio["floor"] <= ratio["best rotation"] <= ratio["consensus"] + 1e-9


def test_the_benchmark_of_compressed_uploads_tells_the_codecs_apart() -> None:
    import torch

    import recorded
    import uploads
    from fedrot import Adapter, LoraPair

    def near(base: Adapter, seed: int, size: float) -> Adapter:
        rng = torch.Generator().manual_seed(seed)
        return base.map(lambda t: t + size * torch.randn(t.shape, generator=rng))

    reference = near(Adapter({"x": LoraPair(torch.zeros(4, 96), torch.zeros(64, 4), 1.0)}), 0, 1.0)
    sent = [[near(reference, 10 * number + client, 1e-3) for client in range(3)] for number in (1, 2, 3)]
    rounds = [recorded.Recorded(number, reference, these, [1.0, 2.0, 1.0]) for number, these in enumerate(sent)]
    found = {what: uploads.measure(rounds, what) for what in uploads.LINES}
    assert [round(line["bytes"], 1) for line in found.values()] == [0.5, 0.5, 0.5, 0.3, 0.3]
    assert found["bf16"]["change"] < found["int8"]["change"] < 0.02 < 0.5 < found["factors"]["change"]
    for codec in ("bf16", "int8"):
        assert found[f"{codec} feedback"]["sum"] < found[codec]["sum"]


def test_the_table_of_compressed_uploads_is_that_of_the_committed_file() -> None:
    import uploads

    rows, text = uploads.read(), (ROOT / "docs" / "methods.md").read_text()
    assert {(row["rank"], row["optimizer"], row["line"]) for row in rows} == {
        (rank, optimizer, line) for rank in ("4", "64") for optimizer in uploads.OPTIMIZERS for line in uploads.LINES
    }
    assert uploads.table(rows) in text
    (int8,) = (r for r in rows if (r["rank"], r["optimizer"], r["line"]) == ("4", "adamw", "int8 feedback"))
    said = f"`int8` is off by {float(int8['update']):.1%} where averaging loses {float(int8['averaging']):.0%} (adamw)."
    assert said in " ".join(text.split())


def test_the_table_of_secure_sums_is_that_of_the_committed_file() -> None:
    import secure_sum

    rows = secure_sum.read()
    assert [(int(r["clients"]), r["neighbours"] or None) for r in rows] == [
        (clients, neighbours and str(neighbours)) for clients, _, neighbours in secure_sum.CASES
    ]
    assert secure_sum.table(rows) in (ROOT / "docs" / "privacy.md").read_text()


def test_the_table_of_private_examples_is_that_of_the_committed_file() -> None:
    import private

    rows = private.read()
    left = [task for task in private.plan(list(private.LINES)) if private.found(rows, *task) is None]
    assert not left
    assert private.table(rows) in (ROOT / "docs" / "privacy.md").read_text()
    assert [private.learnt(rows, line) for line in private.LINES] == [True, True, False]


def test_the_benchmark_of_secure_sums_counts_what_travels() -> None:
    import secure_sum

    _, _, up, down = secure_sum.measured(4, 160, None)
    assert up > 4 * 160
    assert down > 0
    _, _, more, _ = secure_sum.measured(4, 320, None)
    assert more - up == 4 * 160


def test_the_benchmark_of_messages_counts_what_a_round_sends() -> None:
    import network

    loud, quiet = (network.measure("fedrot", 2, every, backwards=every == 0) for every in (1, 0))
    tensors = 4 * network.LAYERS * network.RANK * 2 * network.WIDTH + 4 * 2 * (network.WIDTH + 1)
    assert loud["tensors"] == tensors
    assert (loud["down payload"], quiet["down payload"], quiet["up payload"]) == (1, 1, 1)
    assert loud["up payload"] == pytest.approx(1 + 4 * network.LAYERS * network.RANK**2 / tensors)
    assert loud["up header"] > 10 * quiet["up header"] > 0
    assert min(loud["seconds"], quiet["seconds"], loud["up flower"]) > 0


def test_the_paper_s_page_names_every_recipe_of_it_and_no_other() -> None:
    from fedrot.running.recipe_library import recipes

    named = set(re.findall(r"`(paper/[\w-]+)`", (ROOT / "docs" / "paper.md").read_text()))
    assert named == {name for name in recipes() if name.startswith("paper/")}
