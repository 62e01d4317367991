"""The command line: one line and exit code 2 for everything a user can mend, and light imports."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrot.app.cli.main import COMMANDS, main
from fedrot.learning.fetch import PACKAGES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def one_line(result: tuple[int, str, str], *words: object) -> None:
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("fedrot: ")]
    assert status == 2, err
    assert len(lines) == 1
    assert "Traceback" not in err
    for word in words:
        assert str(word) in lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> Path:
    """A finished run's folder."""
    import yaml

    folder = tmp_path_factory.mktemp("finished")
    values = {
        "name": "tiny",
        "rounds": 3,
        "compute": {"threads": 1},
        "model": {"path": str(tiny_model)},
        "lora": {"rank": 2},
        "data": {
            "path": str(tiny_data),
            "train": "train.csv",
            "validation": "validation.csv",
            "test": "test.csv",
            "group": "group",
            "max_length": 64,
        },
        "partition": {"kind": "column"},
        "local": {"lr": 0.02, "batch": 8, "steps": 4},
        "diagnostics": {"rho": True},
        "evaluation": {"final": "test", "limit": 30},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys, fedrot; from fedrot.app.cli.main import main; main(['--help']); main(['--version']);"
        "heavy = {'torch', 'transformers', 'datasets', 'flwr', 'peft', 'numpy', 'sklearn', 'matplotlib'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_align_loads_torch_and_nothing_of_the_model_side() -> None:
    code = (
        "import sys, fedrot; fedrot.align, fedrot.aggregate, fedrot.Adapter, fedrot.LoraPair;"
        "heavy = {'transformers', 'datasets', 'flwr', 'peft', 'sklearn', 'matplotlib', 'jsonargparse', 'rich', 'yaml'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0 if 'torch' in sys.modules else 'no torch')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_has_help(cli: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--local.lr" in cli("run", "--help")[1]
    assert "--method.strength" in cli("run", "--help")[1]
    assert "--method.strength" not in cli("run", "--method.name", "fedit", "--help")[1]
    assert "--method.strength" not in cli("run", "--method.name=fedit", "--help")[1]
    for command in sorted(set(COMMANDS) - {"run"}):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert f"fedrot {command}" in capsys.readouterr().out


def test_unknown_commands_and_arguments_are_one_line(cli: Run) -> None:
    one_line(cli("runn"), "runn", "run")
    one_line(cli("run"), "give the recipe first")
    one_line(cli("run", "--rounds", "3"), "give the recipe first")
    one_line(cli("run", "none.yaml"), "none.yaml", "no such recipe file")
    one_line(cli("report"), "RUN")
    one_line(cli("report", "no-run"), "no-run", "no such run folder")
    one_line(cli("report", "no-run", "--colour", "red"), "--colour")
    one_line(cli("eval"), "adapter")
    one_line(cli("data", "fetch"), "NAME")
    one_line(cli("data", "fetch", "everything"), "everything", "vader")
    one_line(cli("data", "list", "--all"), "--all")
    one_line(cli("methods", "fedit"), "fedit")
    assert main([]) == 2


BAD_RUNS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "unknown key": ({"local": {"ratte": 1}}, [], ["recipe.yaml", "local.ratte"]),
    "wrong type": ({"local": {"lr": "fast"}}, [], ["recipe.yaml", "local.lr", "fast"]),
    "unknown option": ({}, ["--local.ratte", "1"], ["--local.ratte", "--local.lr"]),
    "nearly an option": ({}, ["--resum"], ["--resum: there is no such option; did you mean '--resume'?"]),
    "option like none": ({}, ["--colour", "red"], ["--colour: there is no such option; see fedrot run --help"]),
    "missing value": ({}, ["--out"], ["--out"]),
    "unknown method": ({"method": {"name": "fedavg"}}, [], ["fedavg", "fedrot"]),
    "missing file": ({"data": {"train": "nothing.csv"}}, [], ["nothing.csv", "no such file"]),
    "missing column": ({"data": {"label": "colour"}}, [], ["train.csv", "colour", "data.label"]),
    "client with no data": ({"partition": {"minimum": 1000}}, [], ["'books'", "partition.minimum"]),
    "absent targets": ({"lora": {"targets": ["wings"]}}, [], ["lora.targets", "wings", "query"]),
    "missing model": ({"model": {"path": "./no-such-model"}}, [], ["no-such-model", "model.path"]),
    "hub model without a network": ({"model": {"path": "some-group/some-model"}}, [], ["some-group/some-model"]),
    "missing start": ({"init": "no-adapter"}, [], ["no-adapter"]),
    "unknown split": ({"evaluation": {"split": "dev"}}, [], ["evaluation.split", "dev", "validation"]),
    "not fetched": ({"model": {"path": "fetch:minilm"}}, [], ["fedrot data fetch minilm"]),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_input_to_run_is_one_line_and_writes_nothing(
    case: str, cli: Run, recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDROT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    changes, flags, words = BAD_RUNS[case]
    one_line(cli("run", recipe_file(**changes), "--out", "out", *flags), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "rounds: [1\n", "- 1\n"])
def test_a_broken_or_empty_recipe_is_one_line(text: str, cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    one_line(cli("run", path), path)


def test_a_changed_recipe_a_second_run_and_a_damaged_checkpoint_are_one_line(
    cli: Run, finished: Path, tmp_path: Path
) -> None:
    recipe, run = finished.parent / "recipe.yaml", tmp_path / "run"
    shutil.copytree(finished, run)
    one_line(cli("run", recipe, "--out", run), run, "--resume")
    one_line(cli("run", recipe, "--out", run, "--resume", "--local.lr", "0.5"), "local.lr", "0.02", "0.5")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    state = run / "checkpoints" / "round-000003" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-7] + b"damaged")
    one_line(cli("run", recipe, "--out", run, "--resume"), state, "damaged", "round-000002")
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in (".lock", state.name)}
    assert after == {p: content for p, content in before.items() if p.name != state.name}
    shutil.rmtree(state.parent)
    status, _, err = cli("run", recipe, "--out", run, "--resume")
    assert status == 0, err
    adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in (finished, run)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(recipe_file: Any, tmp_path: Path) -> None:
    """The size limit of a process's files stands in for a full disk: writes fail half-way, as there."""
    path, out = recipe_file(rounds=4), tmp_path / "run"
    words = ["run", str(path), "--out", str(out)]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({12_000}, resource.RLIM_INFINITY)); "
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code = limit + ignore + f"import sys; from fedrot.app.cli.main import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("fedrot: ")
    assert "Traceback" not in done.stderr
    assert "--resume" in done.stderr
    assert (out / "recipe.yaml").exists()
    assert main([*words, "--resume"]) == 0
    assert main([*words[:-1], str(tmp_path / "straight")]) == 0
    adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in (out, tmp_path / "straight")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


RESUME = "finished rounds are on disk, go on with the same command and --resume"
AGAIN = "finished runs are on disk, the same command goes on"


@pytest.mark.parametrize(
    ("command", "begun", "advice"), [("run", False, ""), ("run", True, RESUME), ("compare", False, AGAIN)]
)
def test_what_is_advised_when_work_ends_early_can_be_followed(
    command: str, begun: bool, advice: str, cli: Run, recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def end(ending: BaseException) -> tuple[int, str]:
        def run(*arguments: object, **options: object) -> None:
            if begun:
                out.mkdir(exist_ok=True)
                (out / "recipe.yaml").touch()
            raise ending

        monkeypatch.setattr("fedrot.running.run.run", run)
        monkeypatch.setattr("fedrot.app.compare.run.run", run)
        status, _, err = cli(command, recipe_file(), "--out", out)
        return status, err.splitlines()[-1]

    end_of_line = f"; {advice}" if advice else ""
    assert end(KeyboardInterrupt()) == (130, f"fedrot: interrupted{end_of_line}")
    full = OSError(errno.ENOSPC, "No space left on device", "some.file")
    assert end(full) == (2, f"fedrot: some.file: No space left on device; free some space{end_of_line}")


def test_a_full_disk_advises_no_resume_where_there_is_none(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    monkeypatch.setattr("fedrot.learning.fetch.fetch", fetch)
    result = cli("data", "fetch", "vader")
    one_line(result, "vader: No space left on device; free some space")
    assert "--resume" not in result[2]


def test_no_traceback_and_code_2_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedrot.app.cli.main", "run", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_methods_are_listed_whole_when_piped(cli: Run) -> None:
    from fedrot.core.methods import methods

    status, out, _ = cli("methods")
    assert status == 0
    for name, method in methods().items():
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert method.paper in line
        assert method.capabilities.reduction in line


def test_a_reader_that_stops_early_is_no_error() -> None:
    process = subprocess.run(
        f"{sys.executable} -m fedrot.app.cli.main methods | true", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in process.stderr


def test_data_show_prints_every_client_and_draws_them(cli: Run, recipe_file: Any, tmp_path: Path) -> None:
    status, out, _ = cli("data", "show", recipe_file(), "--png", tmp_path / "labels.png")
    assert status == 0
    for word in ("books", "films", "music", "negative", "positive", "train: 180 examples, 3 clients"):
        assert word in out
    one_line(cli("data", "show", recipe_file(), "--png", tmp_path / "labels.txt"), "labels.txt: must end in .png")
    assert (tmp_path / "labels.png").read_bytes().startswith(b"\x89PNG")
    status, out, _ = cli("data", "show", recipe_file(), "--partition.kind", "iid", "--partition.clients", "4")
    assert "client-3" in out
    uneven = {"kind": "dirichlet", "clients": 2, "by": "length"}
    status, out, _ = cli("data", "show", recipe_file(partition=uneven), "--png", tmp_path / "lengths.png")
    assert status == 0
    assert out.count("length ") == 2 * 3
    assert "positive" not in out


def test_data_lists_what_can_be_fetched(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDROT_CACHE", str(tmp_path))
    status, out, _ = cli("data")
    assert status == 0
    assert out.count("not fetched") == len(PACKAGES)
    assert str(tmp_path) in out


def test_eval_gives_the_accuracy_that_the_run_stated(cli: Run, finished: Path) -> None:
    stated = json.loads((finished / "result.json").read_text())["final"]
    for words in ([finished], [finished / "adapter", "--recipe", finished.parent / "recipe.yaml", "--split", "test"]):
        status, out, err = cli("eval", *words, "--json")
        assert status == 0, err
        assert json.loads(out) == stated
    status, out, _ = cli("eval", finished, "--split", "validation", "--limit", "20")
    assert "validation  20 examples" in out
    one_line(cli("eval", finished, "--split", "dev"), "dev", "test")
    one_line(cli("eval", finished.parent / "elsewhere"), "--recipe")
    one_line(cli("eval", finished.parent), "--recipe")
    # The adapter's own rank and scale count, whatever the recipe's are; its layers must be the recipe's.
    assert json.loads(cli("eval", finished, "--lora.rank", "3", "--json")[1]) == stated
    one_line(cli("eval", finished, "--lora.targets", "[key]"), "layer", "is missing")
    one_line(cli("eval", finished, "--limit", "0"), "--limit")
    one_line(cli("eval", finished, "--lora.head", "personal"), "personal", "clients/")


def test_eval_of_a_missing_or_bare_adapter_is_one_line(cli: Run, finished: Path) -> None:
    recipe = finished.parent / "recipe.yaml"
    one_line(cli("eval", finished / "nothing", "--recipe", recipe), "nothing", "no such adapter folder")
    bare = finished / "adapter" / "adapter_model.safetensors"
    one_line(cli("eval", bare, "--recipe", recipe), "this is a file")


def test_plain_transformers_and_peft_give_the_stated_accuracy(
    finished: Path, tiny_model: Path, tiny_data: Path
) -> None:
    import csv

    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model = PeftModel.from_pretrained(base, finished / "adapter").eval()
    with (tiny_data / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    labels = torch.tensor([int(row["label"] == "positive") for row in rows])
    accuracy = float((logits.argmax(-1) == labels).float().mean())
    stated = json.loads((finished / "result.json").read_text())["final"]
    assert stated["examples"] == len(rows)
    assert accuracy == pytest.approx(stated["accuracy"])


def test_progress_is_plain_lines_in_a_log(recipe_file: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fedrot.app.cli.main",
            "run",
            str(recipe_file(rounds=2)),
            "--out",
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TERM": "xterm"},
    )
    lines = done.stderr.splitlines()
    assert lines[0].startswith("cpu, 1 worker of 1 thread, fp32"), done.stderr
    assert [line[:13] for line in lines[1:]] == ["round 0 [1/2]", "round 1 [2/2]"], done.stderr
    assert all("validation accuracy" in line for line in lines[1:])
    assert all("\x1b" not in line for line in lines)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["test", "adapter", "report"]
