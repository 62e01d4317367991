"""`fedrot compare`: the plan, the numbers against hand-made ones, resuming, and what is refused."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from site_runs import simulated

from fedrot.app.cli.main import main
from fedrot.app.compare.plan import Planned, Variant, plan, read_seeds, read_variants
from fedrot.app.compare.table import Outcome, cells, half_width, outcome, rows, to_csv, to_markdown
from fedrot.app.report.comparison_figures import scores, sweep
from fedrot.app.report.load import load_runs
from fedrot.core.errors import RecipeError, RunError
from fedrot.running.folder import RunFolder


def made(method: str, seed: int, accuracy: float, setting: str = "", rounds: int | None = 3) -> Outcome:
    return Outcome(
        method, setting, seed, "test", "accuracy", accuracy, accuracy - 0.1, 0.05, rounds, 0.2, 0.1, 1.0, 2.0, 3.0
    )


def test_variants_are_methods_with_settings_and_swept_values() -> None:
    found = read_variants("fedit,fedrot,fedrot:factor=joint", ["method.strength=0,.4", "lora.rank=2,4"])
    assert [v.label for v in found] == [
        "fedit lora.rank=2",
        "fedit lora.rank=4",
        *(f"fedrot{s} strength={x} lora.rank={r}" for s in ("", " factor=joint") for x in ("0", ".4") for r in (2, 4)),
    ]
    assert found[-1].flags == (
        "--method.name=fedrot",
        "--method.factor=joint",
        "--method.strength=.4",
        "--lora.rank=4",
    )
    assert len({v.folder for v in found}) == len(found)


@pytest.mark.parametrize(
    ("methods", "sweeps", "words"),
    [
        ("fedit,nope", [], "there is no method 'nope'"),
        ("fedit:strength=1", [], "'strength=1' is no setting of fedit"),
        ("fedrot:strength", [], "give key=value"),
        ("fedit,fedit", [], "'fedit' is given twice"),
        ("fedit", ["method.strength=0,1"], "method.strength is a setting of none of the methods"),
        ("fedit", ["method.strength"], "--sweep must be key=value"),
        ("fedit", ["lora.rank="], "--sweep must be key=value"),
        ("fedit", ["seed=1,2"], "--sweep: seed: a comparison sets it for each run; give --seeds"),
        ("fedit", ["method.name=ffa"], "--sweep: method.name: a comparison sets it for each run; give --methods"),
        ("fedit", ["name=a,b"], "--sweep: name only names the run"),
    ],
)
def test_a_bad_plan_is_refused(methods: str, sweeps: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("(", r"\(")):
        read_variants(methods, sweeps)


@pytest.mark.parametrize("text", ["", "a", "0,0", "1.5"])
def test_bad_seeds_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--seeds"):
        read_seeds(text)


def test_a_combination_that_cannot_work_is_refused_before_anything_runs(recipe_file: Any, tmp_path: Path) -> None:
    path = recipe_file(server={"optimizer": "adam"})
    with pytest.raises(RecipeError, match=r"server\.optimizer: method flexlora"):
        plan(path, [], read_variants("fedit,flexlora", []), [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_differences_are_paired_by_seed_and_within_a_setting() -> None:
    values = {"fedit": [0.5, 0.7, 0.6], "other": [0.55, 0.72, 0.68]}
    outcomes = [made(name, seed, v) for name, listed in values.items() for seed, v in enumerate(listed)]
    outcomes += [made("fedit", 0, 0.1, "lora.rank=9"), made("other", 0, 0.4, "lora.rank=9")]
    base, other, _, alone = rows(outcomes, "fedit")
    assert (base.difference, base.difference_ci) == (None, None)
    assert base.score == pytest.approx(0.6)
    assert base.score_sd == pytest.approx(0.1)
    assert other.difference == pytest.approx(0.05)
    interval = stats.ttest_rel(values["other"], values["fedit"]).confidence_interval(0.95)
    assert other.difference_ci == pytest.approx((interval.high - interval.low) / 2)
    assert alone.difference == pytest.approx(0.3)
    assert alone.difference_ci is None


def test_a_seed_that_the_baseline_lacks_is_no_pair() -> None:
    found = rows([made("fedit", 0, 0.5), made("other", 0, 0.6), made("other", 1, 0.9)], "fedit")
    assert found[1].difference == pytest.approx(0.1)
    assert found[1].seeds == 2


def test_rounds_to_target_is_the_mean_of_those_that_got_there() -> None:
    (row,) = rows([made("fedit", 0, 0.5, rounds=2), made("fedit", 1, 0.5, rounds=None)], "fedit")
    assert (row.rounds_to_target, row.reached, row.seeds) == (2, 1, 2)


def test_simulated_time_to_target_has_a_column_where_clients_have_speeds() -> None:
    slow, fast = (replace(made("fedit", seed, 0.5), clock_to_target=clock) for seed, clock in enumerate((30.0, 10.0)))
    (row,) = rows([slow, fast, made("fedit", 2, 0.5, rounds=None)], "fedit")
    assert row.clock_to_target == 20
    head, line = cells([row], "fedit", "test")
    assert dict(zip(head, line, strict=True))["simulated seconds to target"] == "20.0 (2 of 3)"
    assert "simulated seconds to target" not in cells(rows([made("fedit", 0, 0.5)], "fedit"), "fedit", "test")[0]


def test_the_interval_of_one_value_is_not_known() -> None:
    assert half_width([0.1]) is None
    assert half_width([0.0, 0.2]) == pytest.approx(float(stats.t.ppf(0.975, 1)) * math.sqrt(0.02) / math.sqrt(2))


def test_tables_are_csv_and_markdown_that_others_can_read() -> None:
    read = list(csv.DictReader(to_csv([made("fedit", 0, 0.5)]).splitlines()))
    assert read[0]["score"] == "0.5"
    assert read[0]["rounds_to_target"] == "3"
    lines = to_markdown([["a", "b"], ["1", ""]]).splitlines()
    assert lines == ["| a | b |", "|---|---|", "| 1 | - |"]


def compare(recipe: Path, out: Path, *words: str) -> int:
    return main(["compare", str(recipe), "--out", str(out), "--evaluation.final", "null", "--rounds", "2", *words])


def test_it_runs_resumes_and_shows(recipe_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = recipe_file(), tmp_path / "out"
    words = ("--methods", "fedit,fedrot,ffa,fedsa", "--seeds", "0,1", "--sweep", "method.strength=0,1")
    assert compare(recipe, out, *words) == 0
    shown = capsys.readouterr().out
    table = (out / "table.md").read_text()
    assert shown.startswith(table)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "fedit",
        "fedrot strength=0",
        "fedrot strength=1",
        "ffa",
        "fedsa",
    ]
    # Strength 0 is FedIT: same splits, batches and start, so the very same numbers.
    listed = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    by = {(row["method"], row["seed"]): row for row in listed}
    for seed in "01":
        same = [by[name, seed]["score"] for name in ("fedit", "fedrot strength=0")]
        assert same[0] == same[1]
    result = json.loads((out / "ffa" / "seed-1" / "result.json").read_text())
    assert float(by["ffa", "1"]["score"]) == result["evaluation"]["accuracy"]
    page = (out / "report.html").read_text()
    assert "fedrot strength=1" in page
    assert page.count("<img ") == len(list((out / "figures").glob("*.png"))) == 6

    # One run is cut after its first round, one is gone: only these two are run again, to the same numbers.
    before = (out / "table.md").read_text()
    cut = out / "fedit" / "seed-0"
    shutil.rmtree(cut / "checkpoints" / "round-000002")
    (cut / "result.json").unlink()
    shutil.rmtree(out / "ffa" / "seed-1")
    assert compare(recipe, out, *words) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert [line for line in told if "finished before" not in line] == [
        "[1/10] fedit, seed 0: goes on",
        "[9/10] ffa, seed 1: starts",
    ]
    drop = [[cell.strip() for cell in line.split("|")[:-2]] for line in before.splitlines()]
    assert [[c.strip() for c in line.split("|")[:-2]] for line in (out / "table.md").read_text().splitlines()] == drop

    with pytest.raises(RunError, match=r"was run with local\.steps 3, now it is 4"):
        plan(recipe, ["--local.steps=4", "--rounds=2"], read_variants("fedit", []), [0], out)


def test_a_run_that_fails_is_said_and_the_others_are_compared(
    recipe_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--methods", "fedit", "--sweep", "local.lr=0.01,1e30", "--local.optimizer", "sgd", "--local.clip", "null")
    assert compare(recipe_file(), tmp_path / "out", *words) == 0
    shown = capsys.readouterr().out
    assert "failed: fedit local.lr=1e30, seed 0: round 0: 0 of 3 uploads were usable" in shown
    assert "| fedit local.lr=0.01 |" in shown


def test_table_and_figures_have_the_scores_of_the_round_that_was_chosen(tmp_path: Path) -> None:
    folder = simulated(tmp_path / "fedrot" / "seed-0")  # its scores are 0.5 and 0.6
    (run,) = load_runs([folder])
    first = run.metrics[0]["evaluation"]
    RunFolder(folder).write_json("result.json", {"rounds": 2, "round": 0, "evaluation": first})
    one = Planned(Variant("fedrot", (), {}), 0, run.recipe, folder)
    assert outcome(one, 0.5).score == 0.5
    (run,) = load_runs([folder])
    for figure in (scores({"fedrot": [run]}), sweep("lora.rank", [("fedrot", "2", run)])):
        assert 0.5 in [x for line in figure.axes[0].lines for x in (*line.get_xdata(), *line.get_ydata())]
        assert 0.6 not in [x for line in figure.axes[0].lines for x in (*line.get_xdata(), *line.get_ydata())]


def test_it_says_in_one_line_what_is_wrong(recipe_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (["--baseline", "nope"], "fedrot: --baseline: there is no method 'nope' here; choose fedit or fedrot\n"),
        (["--methods", "fedit", "--method.strength", "1"], "--method.strength: there is no such option"),
        (["--seeds", "x"], "--seeds must be whole numbers"),
        (["--seed", "5"], "fedrot: --seed: a comparison sets it for each run; give --seeds\n"),
        (["--method.name=ffa"], "fedrot: --method.name: a comparison sets it for each run; give --methods\n"),
        (["--method", "fedit,ffa"], "fedrot: --method: a comparison sets it for each run; give --methods\n"),
        (["--baselin", "fedit"], "--baselin: there is no such option; did you mean '--baseline'?\n"),
    ):
        assert main(["compare", str(recipe_file()), *words]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
