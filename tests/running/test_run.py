"""Whole runs on a tiny model: determinism, kill and resume, heads, start from an adapter, trackers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import Silent, go, outcome

from fedrot import Adapter
from fedrot.core.errors import DataError, FedrotError, RunError
from fedrot.running.choices import adopted
from fedrot.running.folder import RunFolder
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe, read_recipe
from fedrot.running.run import run


def test_a_run_learns_and_leaves_a_complete_folder(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    folder = go(tiny_values, tmp_path / "run", "--rounds", "8", "--local.steps", "8")
    names = {path.name for path in folder.path.iterdir()}
    assert {"recipe.yaml", "versions.json", "partition.json", "metrics.jsonl", "checkpoints", "adapter"} <= names
    result = folder.read_json("result.json")
    assert result["final"]["split"] == "test"
    assert result["final"]["accuracy"] > 0.75
    assert set(result["final"]["by_client"]) == {"books", "films", "music"}
    assert result["final"]["worst"] == min(result["final"]["by_client"].values())
    resolved = folder.recipe()
    assert None not in vars(resolved.compute).values(), "nothing is left open in the resolved recipe"
    assert resolved == adopted(parse_recipe(tiny_values, ["--rounds", "8", "--local.steps", "8"]), resolved)


def test_the_same_recipe_gives_the_same_bits_in_another_process(recipe_file: Any, tmp_path: Path) -> None:
    path = recipe_file(federation={"participation": 0.67})
    done = subprocess.run([*command(path), "--out", str(tmp_path / "other")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "other") == outcome(here(path, tmp_path / "here"))


def here(recipe: Path, out: Path) -> Path:
    """The recipe, run in this process."""
    return run(read_recipe(recipe), out, Silent()).path


def command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "fedrot.app.cli.main", "run", str(recipe)]


def test_killed_at_random_points_and_resumed_is_uninterrupted_bit_for_bit(recipe_file: Any, tmp_path: Path) -> None:
    path = recipe_file(rounds=14, lora={"head": "personal"}, checkpoint={"keep": 1}, evaluation={"every": 3})
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    here(path, straight)

    rng = random.Random(5)
    kills = 0
    for attempt in range(30):
        resume = ["--resume"] if (broken / "recipe.yaml").exists() else []
        process = subprocess.Popen(
            [*command(path), "--out", str(broken), *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if attempt < 4:
            target = lines_of(broken) + rng.randint(1, 3)
            while process.poll() is None and lines_of(broken) < target:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.08)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills >= 2, "the run was too fast to be killed"
    assert outcome(broken) == outcome(straight)
    for client in ("000", "001", "002"):
        files = [folder / "clients" / client / "adapter_model.safetensors" for folder in (straight, broken)]
        assert files[0].read_bytes() == files[1].read_bytes()


def lines_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("step", ["append_metrics", "save_checkpoint", "forget_metrics_from", "write_json"])
def test_a_crash_between_any_two_writes_of_a_run_is_made_good(
    step: str, tiny_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = go(tiny_values, tmp_path / "straight")
    owner: Any = RunFolder if step != "save_checkpoint" else sys.modules["fedrot.running.run"]
    original = getattr(owner, step)
    for at in range(3):
        out, calls = tmp_path / f"broken-{at}", 0

        def crashing(*args: Any, at: int = at, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise Crash
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, crashing)
            try:
                go(tiny_values, out)
            except Crash:
                pass
            else:
                continue
        go(tiny_values, out, resume=True)
        assert outcome(out) == outcome(straight.path)


def test_a_cut_last_line_of_metrics_is_left_out(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    folder = go(tiny_values, tmp_path / "run")
    expected = outcome(folder.path)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "cli')
    assert len(folder.metrics()) == 3
    go(tiny_values, folder.path, resume=True)
    assert outcome(folder.path) == expected


def test_a_resume_with_another_recipe_model_or_data_is_refused(
    tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    folder = go(tiny_values, tmp_path / "run")
    before = outcome(folder.path)
    with pytest.raises(RunError, match=r"local\.lr 0\.01, the recipe now has 0\.5"):
        go(tiny_values, folder.path, "--local.lr", "0.5", resume=True)
    with pytest.raises(RunError, match="a run is there already; go on with --resume"):
        go(tiny_values, folder.path)
    with pytest.raises(RunError, match="no such run folder"):
        go(tiny_values, tmp_path / "none", resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="not a run folder"):
        go(tiny_values, tmp_path / "empty", resume=True)
    changed = tmp_path / "data"
    changed.mkdir()
    for name in ("train.csv", "validation.csv", "test.csv"):
        (changed / name).write_bytes((tiny_data / name).read_bytes())
    values = tiny_values | {"data": tiny_values["data"] | {"path": str(changed)}}
    other = go(values, tmp_path / "other")
    (changed / "train.csv").write_text((changed / "train.csv").read_text().replace("good", "bad"))
    with pytest.raises(RunError, match="the data is not what the run was started with"):
        go(values, other.path, resume=True)
    assert outcome(folder.path) == before


def test_two_processes_cannot_share_a_run(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(parse_recipe(tiny_values))
    with pytest.raises(RunError, match="another process is running this run"):
        go(tiny_values, tmp_path / "run", resume=True)
    folder.close()
    go(tiny_values, tmp_path / "run", resume=True)


def test_bad_input_writes_nothing(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    cases: list[tuple[list[str], str]] = [
        (["--data.train", "none.csv"], "none.csv"),
        (["--data.label", "colour"], "colour"),
        (["--lora.targets", "[wings]"], "lora.targets"),
        (["--model.path", str(tmp_path / "no-model")], "no-model"),
        (["--evaluation.split", "dev"], "evaluation.split"),
        (["--partition.kind", "iid", "--partition.clients", "5000"], "partition.clients"),
        (["--partition.minimum", "100"], "books"),
        (["--init", str(tmp_path / "no-adapter")], "no-adapter"),
    ]
    for flags, word in cases:
        with pytest.raises(FedrotError, match=word):
            go(tiny_values, tmp_path / "run", *flags)
        assert not (tmp_path / "run").exists(), flags


def test_strength_zero_is_fedit_bit_for_bit(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    one = go(tiny_values, tmp_path / "one", "--method.name", "fedit")
    other = go(tiny_values, tmp_path / "other", "--method.strength", "0")
    assert outcome(one.path)["adapter"] == outcome(other.path)["adapter"]


@pytest.mark.parametrize("stack", [1, None])
def test_a_client_does_not_depend_on_who_else_takes_part(tiny_values: dict[str, Any], stack: int | None) -> None:
    """Published code leaked the head from client to client through the shared model. In a stack, other clients may
    change the order of sums.
    """
    from fedrot.core.methods.base import Upload
    from fedrot.running.prepare import prepare
    from fedrot.running.simulation import Simulation

    recipe = parse_recipe({**tiny_values, "compute": {"threads": 1, "stack": stack}})
    ready = prepare(recipe)
    broadcast = recipe.method.start(ready.model.read()).broadcast
    uploads = []
    for names in (["films"], ["books", "films"], ["music", "films", "books"]):
        engine = Simulation(ready)
        uploads.append({u.client: u for u in engine.train(broadcast, names) if isinstance(u, Upload)}["films"])
    first = dict(uploads[0].adapter.tensors())
    for upload in uploads[1:]:
        for name, tensor in upload.adapter.tensors():
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=0 if stack == 1 else 1e-5)
        assert upload.metrics == pytest.approx(uploads[0].metrics, rel=0 if stack == 1 else 1e-5)


@pytest.mark.parametrize("method", ["fedit", "fedrot"])
def test_head_policies_are_the_same_for_every_method(method: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    heads = {}
    for policy in ("shared", "personal", "frozen"):
        folder = go(tiny_values, tmp_path / policy, "--lora.head", policy, "--method.name", method)
        heads[policy] = Adapter.load(folder.adapter).head["classifier.weight"]
        result = folder.read_json("result.json")
        assert result["final"]["model"] == ("personal" if policy == "personal" else "global")
    assert torch.equal(heads["personal"], heads["frozen"]), "a head that does not travel stays as it was at the start"
    assert not torch.equal(heads["shared"], heads["frozen"])
    own = [Adapter.load(path.parent) for path in sorted((tmp_path / "personal/clients").glob("*/adapter_config.json"))]
    assert len(own) == 3
    assert len({tuple(a.head["classifier.weight"].flatten().tolist()) for a in own}) == 3
    names = json.loads((tmp_path / "personal/clients/names.json").read_text())
    assert list(names.values()) == ["books", "films", "music"]


def test_a_run_can_start_from_an_adapter(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    first = go(tiny_values, tmp_path / "first")
    start = Adapter.load(first.adapter)
    second = go(tiny_values, tmp_path / "second", "--init", str(first.adapter), "--rounds", "1")
    third = go(tiny_values, tmp_path / "third", "--rounds", "1")
    assert outcome(second.path)["adapter"] != outcome(third.path)["adapter"]
    assert second.metrics()[0]["train"]["loss"] < third.metrics()[0]["train"]["loss"]
    assert start.layers.keys() == Adapter.load(second.adapter).layers.keys()
    with pytest.raises(DataError, match=r"shape .* \(the model with the recipe's lora settings\)"):
        go(tiny_values, tmp_path / "other", "--init", str(first.adapter), "--lora.rank", "3")
    with pytest.raises(DataError, match=r"set lora\.alpha to match"):
        go(tiny_values, tmp_path / "other", "--init", str(first.adapter), "--lora.alpha", "32")


def test_a_client_whose_loss_explodes_is_dropped_and_the_quorum_holds(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"round 0: 0 of 3 uploads were usable.*the loss is .* lower local\.lr"):
        go(tiny_values, tmp_path / "run", "--local.lr", "1e30", "--local.clip", "null", "--local.optimizer", "sgd")


def test_metrics_go_to_tensorboard_when_the_recipe_says_so(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = go(tiny_values, tmp_path / "run", "--tracking.to", "[tensorboard]")
    found = next((folder.path / "tensorboard" / "tiny").glob("events.*"))
    events = EventAccumulator(str(found))
    events.Reload()
    accuracy = [event.value for event in events.Scalars("evaluation/accuracy")]
    assert accuracy == pytest.approx([r["evaluation"]["accuracy"] for r in folder.metrics()])


def test_a_tracker_that_is_not_installed_is_named(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"tracking\.to: wandb needs packages.*pip install 'fedrot\[tracking\]' wandb"):
        go(tiny_values, tmp_path / "run", "--tracking.to", "[wandb]")


def test_a_recipe_is_a_value(tiny_values: dict[str, Any]) -> None:
    assert parse_recipe(tiny_values) == parse_recipe(tiny_values)
    assert isinstance(hash(parse_recipe(tiny_values).method), int)
    assert isinstance(parse_recipe(tiny_values), Recipe)


def test_an_interrupted_run_says_how_to_go_on(recipe_file: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*command(recipe_file(rounds=200)), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, a shell may have told its children to ignore this signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and lines_of(out) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    last = [line for line in errors.splitlines() if not line.startswith(("round ", "cpu, "))]
    assert last == ["fedrot: interrupted; finished rounds are on disk, go on with the same command and --resume"]


def test_a_new_run_overwrites_nothing(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    for name in ("checkpoints", "metrics.jsonl", "adapter"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(RunError, match=rf"{name}: is there already"):
            go(tiny_values, tmp_path / name)
    folder = go(tiny_values, tmp_path / "run")
    (folder.path / "versions.json").unlink()
    with pytest.raises(RunError, match=r"has checkpoints and no versions\.json"):
        go(tiny_values, folder.path, resume=True)


def test_a_copy_of_a_checkpoint_is_not_taken_for_one(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    folder = go(tiny_values, tmp_path / "run")
    expected = outcome(folder.path)
    shutil.copytree(folder.checkpoints / "round-000002", folder.checkpoints / "round-000003.bak")
    go(tiny_values, folder.path, resume=True)
    assert outcome(folder.path) == expected
    state = folder.checkpoints / "round-000003" / "state.json"
    for damage in ({"forms": {}}, {"rounds": 2}, {"clients": 3}):
        whole = json.loads(state.read_text())
        state.write_text(json.dumps(whole | damage))
        with pytest.raises(RunError, match=r"state\.json: the checkpoint is damaged"):
            go(tiny_values, folder.path, resume=True)
        state.write_text(json.dumps(whole))


def test_lines_missing_from_the_metrics_are_noticed(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    folder = go(tiny_values, tmp_path / "run")
    lines = (folder.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept in ([], lines[:2], lines[1:], ["3\n", *lines]):
        (folder.path / "metrics.jsonl").write_text("".join(kept))
        with pytest.raises(RunError, match=r"metrics\.jsonl: .*damaged"):
            go(tiny_values, folder.path, resume=True)


def test_a_resume_does_not_need_the_adapter_that_the_run_began_with(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    import shutil

    first = go(tiny_values, tmp_path / "first")
    flags = ("--init", str(first.adapter))
    second = go(tiny_values, tmp_path / "second", *flags)
    expected = outcome(second.path)
    shutil.rmtree(first.adapter)
    go(tiny_values, second.path, *flags, resume=True)
    assert outcome(second.path) == expected


def test_a_client_that_was_dropped_stays_as_it_was(tiny_values: dict[str, Any]) -> None:
    from fedrot.running.prepare import prepare
    from fedrot.running.simulation import Simulation

    recipe = parse_recipe(tiny_values, ["--lora.head", "personal"])
    ready = prepare(recipe)
    engine = Simulation(ready)
    list(engine.train(recipe.method.start(ready.model.read()).broadcast, ["books", "films"]))
    assert not engine.states()
    engine.settle(["films"])
    assert set(engine.states()) == {"films"}


def test_texts_longer_than_the_model_and_pickled_weights_are_refused(
    tiny_values: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    with pytest.raises(DataError, match=r"data\.max_length is 128.*64 positions"):
        go(tiny_values, tmp_path / "run", "--data.max_length", "128")
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be loaded"):
        go(tiny_values, tmp_path / "run", "--model.path", str(tmp_path / "model"))
