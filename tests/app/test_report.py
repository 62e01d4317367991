"""The report: every figure drawn, one page that needs nothing else, and a verdict that follows the numbers."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from site_runs import simulated

from fedrot.app.progress import LiveWatcher, round_line
from fedrot.app.report import build, comparison_figures, figures
from fedrot.app.report.build import build_report
from fedrot.app.report.load import RunData, load_runs
from fedrot.app.report.verdict import verdict
from fedrot.core.errors import RunError
from fedrot.core.settings import DiagnosticsSettings
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe


def record(number: int, before: float = 0.2, after: float = 0.2, floor: float = 0.1, **more: Any) -> dict[str, Any]:
    """A round's record as rounds.py writes it."""
    return {
        "round": number,
        "clients": {"drawn": 2, "used": ["a", "b"], "dropped": {}},
        "train": {"loss": 0.7, "rows": 10, "tokens": 100},
        "bytes": {"down": 1000, "up": 900},
        "aggregation": {
            "estimated": False,
            "before": before,
            "after": after,
            "before_relative": before,
            "after_relative": after,
            "floor_relative": floor,
        },
        "drift": {
            "a_min": 0.1,
            "b_min": 0.1,
            "gauge_share": 0.001,
            "angle_mean": 0.01,
            "angle_max": 0.02,
            "turn_mean": 0.01,
        },
        "evaluation": {
            "split": "validation",
            "examples": 5,
            "model": "global",
            "metric": "accuracy",
            "accuracy": 0.5,
            "macro_f1": 0.5,
            "loss": 0.7,
            "worst": 0.4,
            "spread": 0.1,
            "by_client": {"a": 0.4, "b": 0.6},
        },
        "seconds": {"train": 1.0, "round": 1.5},
    } | more


@pytest.fixture
def recipe(tiny_values: dict[str, Any]) -> Recipe:
    return parse_recipe(tiny_values)


def data(recipe: Recipe, records: list[dict[str, Any]], label: str = "fedrot 0.4") -> RunData:
    partition = {"labels": ["no", "yes"], "label_counts": {"train": {"a": [3, 4], "b": [5, 1]}}}
    return RunData(label, Path("runs/x"), recipe, records, partition, {}, {})


def test_the_verdict_follows_the_numbers(recipe: Recipe) -> None:
    calm = verdict(data(recipe, [record(i, after=0.1995) for i in range(4)]))
    assert calm.startswith("Rotation was not the problem: 0.10% of the clients' drift only turned their frames")
    assert "alignment made no difference" in calm
    assert "lost 20.00% of the ideal update before alignment, of which 10.00% is the floor that no rank-2" in calm

    turned = [record(i, before=0.5, after=0.12, floor=0.1) for i in range(4)]
    for one in turned:
        one["aggregation"]["rho"] = 0.97
    cured = verdict(data(recipe, turned))
    assert cured.startswith("Rotation was the main problem: the best possible rotation would recover 97.0%")
    assert "alignment lowered the error by 76.0%, 95% of what is avoidable" in cured

    worse = verdict(data(recipe, [record(i, before=0.001, after=0.003, floor=0.0005) for i in range(4)]))
    assert "the aggregation error is small in any case" in worse
    assert "alignment raised the error by 200.0%" in worse

    part = [record(i) for i in range(4)]
    for one in part:
        one["drift"] |= {"gauge_share": 0.04, "turn_mean": 0.0}
        one["aggregation"]["estimated"] = True
    partly = verdict(data(recipe, part))
    assert partly.startswith("Rotation was a part of the problem")
    assert "no alignment was made" in partly
    assert "by estimate" in partly


def test_the_verdict_is_one_sentence_and_looks_at_the_later_half(recipe: Recipe) -> None:
    early, late = [record(i, before=0.9, after=0.1) for i in range(3)], [record(i + 3) for i in range(3)]
    sentence = verdict(data(recipe, early + late))
    assert "20.00%" in sentence
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")


def test_without_diagnostics_the_verdict_says_so(recipe: Recipe) -> None:
    bare = record(0)
    del bare["aggregation"], bare["drift"]
    off = replace(recipe, diagnostics=DiagnosticsSettings(every=0))
    assert "diagnostics were off" in verdict(data(off, [bare]))
    assert "could not be computed: no convergence." in verdict(data(recipe, [{**bare, "unmeasured": "no convergence"}]))


@pytest.mark.parametrize(
    ("method", "said"), [("fedask", "with fedask uploads are sketches"), ("fedsa", "with fedsa every client keeps a")]
)
def test_a_method_whose_uploads_are_not_comparable_factors_was_not_switched_off(
    method: str, said: str, tiny_values: dict[str, Any]
) -> None:
    bare = record(0)
    del bare["aggregation"], bare["drift"]
    other = parse_recipe(tiny_values, [f"--method.name={method}"])
    assert said in verdict(data(other, [bare]))
    off = replace(other, diagnostics=DiagnosticsSettings(every=0))
    assert "diagnostics were off" in verdict(data(off, [bare]))


def test_a_rule_s_turn_at_the_server_is_an_alignment(tiny_values: dict[str, Any]) -> None:
    still = [record(i, after=0.1) for i in range(4)]
    for one in still:
        one["drift"]["turn_mean"] = 0.0
    words = "alignment by the server (robust.rule norm) lowered the error by 50.0%"
    assert words in verdict(data(parse_recipe(tiny_values, ["--method.name=fedit", "--robust.rule=norm"]), still))
    # Where one factor travels nothing is turned.
    one_factor = parse_recipe(tiny_values, ["--method.name=ffa", "--robust.rule=norm"])
    assert "no alignment was made" in verdict(data(one_factor, still))


FORMULA = "$50_$100"  # read as mathematics it cannot be drawn


def test_a_name_is_drawn_as_it_is_and_never_read_as_mathematics(recipe: Recipe, tmp_path: Path) -> None:
    runs = [data(recipe, [record(i) for i in range(2)], f"{FORMULA} {name}") for name in "ab"]
    for one in (line for run in runs for line in run.metrics):
        one["aggregation"]["sent_relative"] = 1e-5 * 10 ** one["round"]
        one["evaluation"]["by_client"] = {FORMULA: 0.5, "b": 0.6}
    groups = {run.label: [run] for run in runs}
    powers = comparison_figures.error(groups)
    for figure in (
        figures.label_shares({FORMULA: [3, 4], "b": [1, 1]}, [FORMULA, f"{FORMULA}0"]),
        figures.learning(runs),
        figures.aggregation(runs),
        figures.clients(runs),
        figures.cost(runs),
        comparison_figures.scores(groups),
        comparison_figures.sweep("data.group", [("fedit", FORMULA, runs[0]), ("fedit", "b", runs[1])]),
        powers,
    ):
        figures.save(figure, tmp_path / "figure.png")
        assert any(isinstance(text, Text) and FORMULA in text.get_text() for text in figure.findobj())
    # The powers of ten of a logarithmic axis are mathematics.
    ticks = [label for label in powers.axes[0].get_yticklabels() if "10^" in label.get_text()]
    assert ticks
    assert all(label.get_parse_math() for label in ticks)


def test_the_scores_that_count_are_those_of_the_round_that_was_chosen(tiny_values: dict[str, Any]) -> None:
    best = parse_recipe(tiny_values, ["--evaluation.choose=best", "--evaluation.final=null"])
    run = data(best, [record(i) for i in range(3)])
    run.metrics[1]["evaluation"] |= {"accuracy": 0.75, "by_client": {"a": 0.7, "b": 0.8}}
    assert (run.scores["accuracy"], run.round) == (0.5, 2)  # it has not finished
    chosen = replace(run, result={"rounds": 3, "round": 1, "evaluation": run.metrics[1]["evaluation"]})
    (ax,) = figures.clients([chosen]).axes
    assert ax.get_title() == "Accuracy by client on validation, after round 1"
    assert [patch.get_width() for patch in ax.patches] == [0.7, 0.8]
    assert figures.clients([run, chosen]).axes[0].get_title() == "Accuracy by client on validation"
    page = build._page([chosen], [])
    assert "accuracy 0.7500" in page
    assert "round 1 scored best on validation" in page
    assert "scored best" not in build._page([run], [])
    final = replace(chosen, result={**chosen.result, "final": record(0)["evaluation"]})
    assert final.scores["accuracy"] == 0.5


def test_every_figure_draws_its_numbers(recipe: Recipe) -> None:
    runs = [data(recipe, [record(i) for i in range(3)], label) for label in ("fedit", "fedrot 0.4")]
    for draw in (figures.learning, figures.aggregation, figures.gain, figures.drift):
        figure: Figure = draw(runs)
        for ax in figure.axes:
            assert ax.get_title()
            assert ax.lines, f"{draw.__name__} drew nothing"
            assert all(len(line.get_xdata()) in (2, 3) for line in ax.lines)
    assert len(figures.cost(runs).axes[0].patches) == 2 * len(figures.PHASES)
    assert len(figures.clients(runs).axes[0].patches) == 4
    assert [p.get_width() for p in figures.label_shares({"a": [3, 4]}, ["no", "yes"]).axes[0].patches] == [3, 4]


@pytest.fixture
def runs(tiny_values: dict[str, Any], tmp_path: Path) -> list[Path]:
    """Two finished runs."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "running"))
    from fakes import Silent

    from fedrot.running.run import run

    paths = []
    for method in ("fedit", "fedrot"):
        recipe = parse_recipe(tiny_values, ["--method.name", method])
        paths.append(run(recipe, tmp_path / method, Silent()).path)
    return paths


def test_the_page_stands_alone_and_holds_every_figure(runs: list[Path], tmp_path: Path) -> None:
    page = build_report(runs, tmp_path / "both").read_text()
    drawn = sorted(path.stem for path in (tmp_path / "both" / "figures").glob("*.png"))
    assert drawn == ["aggregation", "clients", "cost", "drift", "gain", "labels", "learning"]
    assert page.count("data:image/png;base64,") == len(drawn)
    assert not re.search(r"""(src|href)=["'](?!data:)""", page), "the page asks for something outside itself"
    assert "<script" not in page
    for word in ("fedit", "fedrot 0.4", "Rotation was", "strength: 0.4", "torch"):
        assert word in page


def test_a_name_with_markup_is_shown_and_not_obeyed(runs: list[Path], tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    shutil.copytree(runs[0], evil)
    path = evil / "recipe.yaml"
    path.write_text(path.read_text().replace("name: tiny", "name: <img onerror=alert(1)>"))
    page = build_report([evil], evil).read_text()
    assert "<img onerror" not in page
    assert "&lt;img onerror" in page


def test_two_runs_of_one_method_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "again")
    assert [run.label for run in load_runs([runs[0], tmp_path / "again"])] == ["fedit (fedit)", "fedit (again)"]


def test_runs_whose_folders_have_one_name_are_told_apart_by_what_lies_above(tmp_path: Path) -> None:
    paths = [simulated(tmp_path / name / "seed-0") for name in ("one", "two")]
    assert [run.label for run in load_runs(paths)] == ["fedrot 0.4 (one/seed-0)", "fedrot 0.4 (two/seed-0)"]


def test_runs_of_one_label_have_bars_of_their_own(recipe: Recipe) -> None:
    left, right = figures.cost([data(recipe, [record(0)]), data(recipe, [record(0)])]).axes
    assert len({bar.get_x() for bar in left.patches}) == 2
    assert len({bar.get_x() for bar in right.patches}) == 4


def test_a_run_without_a_finished_round_is_refused_by_name(runs: list[Path]) -> None:
    (runs[0] / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match=r"no round has finished yet"):
        build_report(runs, runs[0])


def test_a_rounds_line_holds_what_matters() -> None:
    line = round_line(record(3, before=0.2, after=0.1, clients={"dropped": {"a": "late"}}), 10)
    for word in ("round  3 [ 4/10]", "loss 0.7000", "validation accuracy 0.5000", "20.00% -> 10.00%", "dropped 1"):
        assert word in line


def test_the_live_display_takes_a_whole_round(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveWatcher() as watcher:
        watcher.round_started(0, 2, ["a", "b"])
        watcher.client_done("a", None)
        watcher.client_done("b", "its loss is [bold]nan[/bold]")
        watcher.evaluating("test")
        watcher.round_finished(record(0))
    shown = capsys.readouterr().err
    assert "dropped b: its loss is [bold]nan[/bold]" in shown
    assert "round 0 [1/2]" in shown


@pytest.mark.parametrize(("rule", "said"), [("norm", "was scaled"), ("krum", "was chosen"), ("median", "cannot bring")])
def test_the_page_lists_what_a_rule_cut_by_client(rule: str, said: str, runs: list[Path], tmp_path: Path) -> None:
    import json

    limited = tmp_path / "limited"
    shutil.copytree(runs[0], limited)
    (limited / "recipe.yaml").write_text((limited / "recipe.yaml").read_text().replace("rule: none", f"rule: {rule}"))
    lines = [json.loads(line) for line in (limited / "metrics.jsonl").read_text().splitlines()]
    for line, kept in zip(lines, (0.25, 1.0, 0.5), strict=True):
        line["clients"]["kept"] = {"honest": 1.0, "<bad>": kept}
    (limited / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = build_report([limited], limited).read_text()
    assert said in page
    assert f"What the rule {rule} kept" in page
    assert "&lt;bad&gt;</td><td>3</td><td>2</td><td>0.583</td><td>0.25</td>" in page
    assert "honest" not in page
    assert "What the rule" not in build_report([runs[1]], tmp_path / "plain").read_text()
