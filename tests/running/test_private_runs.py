"""Private rounds and runs: what leaves a client, what noise does, budgets, resuming, and what is refused."""

import json
import logging
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeEngine, Silent, first_adapter, go, outcome
from tiny_runs import assert_equal, assert_near, begin, cut_and_resumed, flat
from torch import Tensor

from fedrot.app.cli.main import main
from fedrot.app.report.build import build_report
from fedrot.core.adapter import Adapter, part_of
from fedrot.core.checks import RejectedUpload, check_upload
from fedrot.core.methods import methods
from fedrot.core.methods.base import Upload
from fedrot.running.accounting import Accountant
from fedrot.running.draws import draw_clients, drawn_for
from fedrot.running.engine import Failure
from fedrot.running.privacy import silent
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play

PRIVATE = ("--federation.weighting", "uniform", "--privacy.delta", "1e-5")
SUMS = [name for name, m in methods().items() if m.capabilities.private and m.weighting is None]
CLIENTS = ["books", "films", "music"]


def with_privacy(mode: str, noise: float, *flags: str, clip: float = 0.5) -> tuple[str, ...]:
    return (*PRIVATE, "--privacy.mode", mode, "--privacy.noise", str(noise), "--privacy.clip", str(clip), *flags)


def change(adapter: Adapter, start: Adapter) -> dict[str, Tensor]:
    theirs = flat(start)
    return {name: x - theirs[name] for name, x in flat(adapter).items()}


def size(parts: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in parts.values()))


def spread(parts: dict[str, Tensor]) -> float:
    return float(torch.cat([x.flatten() for x in parts.values()]).std())


# Central: noise on the sum.


@pytest.mark.parametrize("method", SUMS)
def test_a_huge_clip_and_no_noise_is_the_plain_run(method: str, tiny_values: dict[str, Any]) -> None:
    plain = begin(tiny_values, "--federation.weighting", "uniform", "--method.name", method).play(3)
    private = begin(tiny_values, *with_privacy("central", 0, "--method.name", method, clip=1e6)).play(3)
    assert_near(flat(private.adapter), flat(plain.adapter), rel=1e-4)
    assert [u.rotation.keys() for u in private.engine.uploads] == [u.rotation.keys() for u in plain.engine.uploads]
    for mine, theirs in zip(private.records, plain.records, strict=True):
        assert mine["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-4)


@pytest.mark.parametrize("method", SUMS)
def test_noise_is_on_what_the_method_sends_and_the_rest_stays(method: str, tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *with_privacy("central", 1.0, "--method.name", method))
    before = tiny.adapter
    moved = change(tiny.play().adapter, before)
    sent = tiny.recipe.method.uploads(0)
    for name, x in moved.items():
        assert bool((x != 0).any()) == (part_of(name) in sent), name
    assert spread({n: x for n, x in moved.items() if part_of(n) in sent}) == pytest.approx(0.5 / 3, rel=0.1)


def test_clients_clip_after_they_turned(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *with_privacy("central", 0, "--method.strength", "1", clip=0.01)).play()
    before = tiny.adapter
    tiny.engine.uploads.clear()
    tiny.play()
    assert any(u.rotation for u in tiny.engine.uploads)
    for upload in tiny.engine.uploads:
        assert size(change(upload.adapter, before)) == pytest.approx(0.01, rel=1e-3)
    assert size(change(tiny.adapter, before)) <= 0.01 * (1 + 1e-3)


def test_the_server_clips_what_a_client_did_not(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *with_privacy("central", 0, clip=0.01))

    def stretched(upload: Upload) -> Upload:
        return replace(upload, adapter=upload.adapter.map(lambda t: t + 1000.0))

    before = tiny.adapter
    honest = begin(tiny_values, *with_privacy("central", 0, clip=0.01)).play().adapter
    tiny.engine.faults["films"] = stretched
    assert size(change(tiny.play().adapter, before)) <= 0.01 * (1 + 1e-3)
    assert size(change(tiny.adapter, honest)) <= 2 * 0.01 / 3 * (1 + 1e-3)


def test_a_dropped_client_leaves_the_divisor_as_it_is(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *with_privacy("central", 0, clip=1e6))
    before = tiny.adapter
    tiny.engine.faults["films"] = lambda upload: Failure("films", "is away")
    tiny.play()
    changes = [change(u.adapter, before) for u in tiny.engine.uploads]
    assert len(changes) == 2
    assert_near(change(tiny.adapter, before), {n: (x + changes[1][n]) / 3 for n, x in changes[0].items()}, rel=1e-3)


def test_drawn_by_chance_means_each_by_itself(tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values, with_privacy("central", 1.0, "--federation.participation", "0.3"))
    names = [f"c{i:02d}" for i in range(40)]
    draws = [drawn_for(recipe, names, number) for number in range(200)]
    assert len({len(drawn) for drawn in draws}) > 5
    assert sum(map(len, draws)) / (200 * 40) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 8000))
    both = sum("c00" in drawn and "c01" in drawn for drawn in draws) / 200
    assert both == pytest.approx(0.09, abs=5 * math.sqrt(0.09 * 0.91 / 200))
    assert draws == [drawn_for(recipe, names[::-1], number) for number in range(200)]
    assert all(drawn == sorted(drawn) for drawn in draws)
    secret = replace(recipe, privacy=replace(recipe.privacy, secure=True))
    assert draws[:50] != (other := [drawn_for(secret, names, number) for number in range(50)])
    assert sum(map(len, other)) / (50 * 40) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 2000))
    # Without noise at the server nobody's absence is counted on, and as many as ever take part.
    usual = parse_recipe(tiny_values, with_privacy("local", 1.0, "--federation.participation", "0.3"))
    assert drawn_for(usual, names, 3) == draw_clients(names, 0.3, usual.seed, 3)


def test_a_round_without_clients_is_noise_and_the_run_goes_on(tiny_values: dict[str, Any]) -> None:
    flags = with_privacy("central", 1.0, "--federation.participation", "0.34", "--rounds", "12")
    tiny = begin(tiny_values, *flags)
    empty = [n for n in range(12) if not drawn_for(tiny.recipe, CLIENTS, n)]
    assert empty
    assert len(empty) < 12
    for number in range(12):
        before = tiny.adapter
        tiny.play()
        record = tiny.records[-1]
        assert record["clients"]["drawn"] == len(drawn_for(tiny.recipe, CLIENTS, number))
        if number in empty:
            assert "train" not in record
            assert "aggregation" not in record
            assert spread(change(tiny.adapter, before)) == pytest.approx(0.5 / (0.34 * 3), rel=0.1)


# Local: noise on each client's own change.


def test_a_local_upload_holds_its_noisy_change_and_nothing_else(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *with_privacy("local", 2.0)).play()
    before = tiny.adapter
    tiny.engine.uploads.clear()
    tiny.play()
    assert {f.name for f in fields(Upload)} == {
        *("client", "adapter", "held", "used", "rotation", "metrics", "layers", "seconds", "variate", "unturned")
    }
    for upload in tiny.engine.uploads:
        assert (upload.held, upload.used, upload.variate, upload.unturned) == (0, 0, None, None)
        assert [upload.rotation, upload.metrics, upload.layers, upload.seconds] == [{}, {}, {}, {}]
        noise = change(upload.adapter, before)
        assert spread(noise) == pytest.approx(1.0, rel=0.1)
    noises = [torch.cat([x.flatten() for x in change(u.adapter, before).values()]) for u in tiny.engine.uploads]
    assert torch.corrcoef(torch.stack(noises)).fill_diagonal_(0).abs().max() < 0.2
    # The mean of what came, no clip and no noise on top.
    columns = [flat(u.adapter) for u in tiny.engine.uploads]
    assert_near(flat(tiny.adapter), {n: sum(c[n] for c in columns) / 3 for n in columns[0]}, rel=1e-5)


def test_local_noise_without_strength_is_the_plain_run(tiny_values: dict[str, Any]) -> None:
    plain = begin(tiny_values, "--federation.weighting", "uniform").play(3)
    private = begin(tiny_values, *with_privacy("local", 0, clip=1e6)).play(3)
    assert_near(flat(private.adapter), flat(plain.adapter), rel=1e-4)


def test_local_rounds_say_nothing_of_what_clients_did_not_send(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *with_privacy("local", 0.1)).play(2)
    for record in tiny.records:
        assert not {"train", "aggregation", "drift"} & record.keys()
        assert record["clients"]["used"] == CLIENTS
        assert record["evaluation"]["split"] == "validation"


def test_a_client_that_failed_sends_noise_and_nobody_can_tell(
    tiny_values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tiny = begin(tiny_values, *with_privacy("local", 2.0, "--local.lr", "1e38", "--local.optimizer", "sgd"))
    before = tiny.adapter
    with caplog.at_level(logging.WARNING, "fedrot"):
        tiny.play()
    assert "sends noise alone" in caplog.text
    assert tiny.records[0]["clients"]["used"] == CLIENTS
    assert tiny.records[0]["clients"]["dropped"] == {}
    for upload in tiny.engine.uploads:
        assert upload == silent(upload, tiny.recipe)
        assert spread(change(upload.adapter, before)) == pytest.approx(1.0, rel=0.1)
    # Under central noise the server is told.
    central = begin(tiny_values, *with_privacy("central", 2.0, "--local.lr", "1e38", "--local.optimizer", "sgd"))
    ((_, made), *_) = list(central.engine.rounds(central.state.broadcast, CLIENTS))
    assert isinstance(made, Failure)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_noise_comes_before_compression(codec: str, tiny_values: dict[str, Any]) -> None:
    """What is compressed is noisy already: it lies on the codec's few values, and near the same noisy change."""
    whole = begin(tiny_values, *with_privacy("local", 2.0)).play()
    small = begin(tiny_values, *with_privacy("local", 2.0, "--federation.compression", codec)).play()
    start = begin(tiny_values).adapter
    for mine, theirs in zip(small.engine.uploads, whole.engine.uploads, strict=True):
        off = size(change(mine.adapter, theirs.adapter))
        assert 0 < off < 0.05 * size(change(theirs.adapter, start))
        assert (mine.metrics, mine.seconds, mine.held) == ({}, {}, 0)
        b = change(mine.adapter, start)[next(n for n in flat(start) if n.endswith("/b"))]  # B starts at zero
        if codec == "bf16":
            assert torch.equal(b.float(), b.to(torch.bfloat16).float())
        else:
            assert len(b[:, 0].unique()) <= 255
            steps = b[:, 0] / (b[:, 0].abs().max() / 127)
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_central_noise_takes_compressed_uploads(codec: str, tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *with_privacy("central", 1.0, "--federation.compression", codec))
    before = tiny.adapter
    assert spread(change(tiny.play().adapter, before)) == pytest.approx(0.5 / 3, rel=0.1)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("held", 3),
        ("used", 3),
        ("metrics", {"loss": 0.5, "steps": 2, "tokens": 40}),
        ("rotation", {"x": torch.eye(2)}),
        ("layers", {"x": {"drift_a": 1.0}}),
        ("seconds", {"train": 0.1}),
    ],
)
def test_the_server_takes_no_report_that_it_must_not_have(what: str, value: Any, tiny_values: dict[str, Any]) -> None:
    form = first_adapter()
    settings = parse_recipe(tiny_values, ()).checks
    bare = Upload("c", form, held=0, used=0)
    check_upload(bare, form, settings, reports=False, turns=False)
    with pytest.raises(RejectedUpload, match=f"beside its change.*{what}"):
        check_upload(replace(bare, **{what: value}), form, settings, reports=False, turns=False)
    with pytest.raises(RejectedUpload, match="held must be a positive whole number"):
        check_upload(bare, form, settings)


def test_uploads_with_reports_are_dropped_from_local_rounds(tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values, with_privacy("local", 1.0))
    engine, seen = FakeEngine(recipe.method, dict.fromkeys("abcd", 5)), Silent()
    engine.faults = {name: lambda upload: silent(upload, recipe) for name in "abc"}
    play(recipe, engine, recipe.method.start(first_adapter()), seen, seen)
    assert seen.records[0]["clients"]["used"] == ["a", "b", "c"]
    assert "beside its change" in seen.dropped["d"]


# Whole runs.


def test_simulated_noise_comes_again_and_secure_noise_does_not(tiny_values: dict[str, Any]) -> None:
    for mode in ("central", "local"):
        one, same = (begin(tiny_values, *with_privacy(mode, 1.0)).play(2) for _ in range(2))
        assert_equal(one.adapter, same.adapter)
        secure = [begin(tiny_values, *with_privacy(mode, 1.0, "--privacy.secure", "true")).play() for _ in range(2)]
        moves = [flat(tiny.adapter) for tiny in secure]
        assert all(not torch.equal(moves[0][name], moves[1][name]) for name in moves[0])


@pytest.mark.parametrize("mode", ["central", "local"])
def test_a_killed_run_goes_on_with_the_same_noise_and_the_same_epsilon(
    mode: str, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    share = ("--federation.participation", "0.67")
    whole, resumed = cut_and_resumed(tiny_values, tmp_path, *with_privacy(mode, 1.5, *share))
    assert resumed == whole
    recipe = parse_recipe(tiny_values, [*with_privacy(mode, 1.5, *share), "--rounds", "4"])
    spent = Accountant(recipe).by_round(CLIENTS)
    assert [record["privacy"] for record in whole["metrics"]] == [{"epsilon": e, "delta": 1e-5} for e in spent]
    assert whole["result"]["privacy"] == {"epsilon": spent[-1], "delta": 1e-5, "rounds": 4, "stopped": False}


@pytest.fixture
def budgeted(tiny_values: dict[str, Any]) -> tuple[str, ...]:
    """Flags of a run of six rounds whose budget is enough for three."""
    flags = (*with_privacy("central", 2.0), "--rounds", "6", "--evaluation.every", "10")
    spent = Accountant(parse_recipe(tiny_values, flags)).by_round(CLIENTS)
    return (*flags, "--privacy.budget", str((spent[2] + spent[3]) / 2))


def test_a_run_ends_before_the_round_that_its_budget_forbids(
    budgeted: tuple[str, ...], tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    stopped = go(tiny_values, tmp_path / "stopped", *budgeted)
    short = go(tiny_values, tmp_path / "short", *budgeted, "--rounds", "3", "--privacy.budget", "1e6")
    mine, other = outcome(stopped.path), outcome(short.path)
    assert mine["adapter"] == other["adapter"]
    assert mine["metrics"] == other["metrics"]
    assert "evaluation" in mine["metrics"][2]
    assert mine["result"]["privacy"] == {**other["result"]["privacy"], "stopped": True}
    assert mine["result"]["round"] == 2
    assert mine["result"]["final"] == other["result"]["final"]
    # A finished run stays finished.
    go(tiny_values, tmp_path / "stopped", *budgeted, resume=True)
    assert outcome(stopped.path) == mine


def test_a_run_that_was_killed_before_its_budget_ends_at_it(
    budgeted: tuple[str, ...], tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    whole = go(tiny_values, tmp_path / "whole", *budgeted)
    shutil.copytree(whole.path, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "round-000003")
    (tmp_path / "cut" / "result.json").unlink()
    go(tiny_values, tmp_path / "cut", *budgeted, resume=True)
    assert outcome(tmp_path / "cut") == outcome(whole.path)


def test_report_log_and_command_line_say_epsilon_and_why_the_run_ended(
    budgeted: tuple[str, ...], recipe_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe_file()), "--out", str(tmp_path / "run"), *budgeted]) == 0
    said = capsys.readouterr()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    epsilon = f"{result['privacy']['epsilon']:.3g}"
    assert f"epsilon {epsilon} at delta 1e-05  (after 3 rounds, where privacy.budget ended the run of 6)" in said.out
    assert f"epsilon {epsilon} at delta 1e-05 after 3 of 6 rounds, where privacy.budget" in said.err
    assert [line for line in said.err.splitlines() if line.startswith("round 2") and f"epsilon {epsilon}" in line]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Differential privacy, central: epsilon {epsilon} at delta 1e-05 after 3 rounds" in page
    assert "ended it after 3 of 6 rounds" in page
    assert "<th>epsilon</th>" in page
    assert f"<td>{epsilon}</td>" in page
    assert (tmp_path / "run" / "figures" / "privacy.png").stat().st_size > 5_000


def test_reports_of_local_noiseless_and_plain_runs_stand_side_by_side(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    runs = [
        go(tiny_values, tmp_path / "local", *with_privacy("local", 2.0)),
        go(tiny_values, tmp_path / "clipped", *with_privacy("central", 0)),
        go(tiny_values, tmp_path / "plain"),
    ]
    page = build_report([run.path for run in runs], tmp_path).read_text()
    assert "not available: with privacy.mode local" in page
    assert "Nothing is promised: changes were clipped at 0.5" in page
    assert "<td>infinite</td>" in page
    assert "<td>none</td>" in page
    assert json.loads((tmp_path / "clipped" / "result.json").read_text())["privacy"]["epsilon"] is None
    plain = build_report([runs[2].path], tmp_path / "alone").read_text()
    assert "epsilon" not in plain.split("How it was run")[0]
