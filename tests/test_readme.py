"""The README: every command and every piece of code in it is run, at reduced size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SMALL = "--rounds 1 --local.steps 1 --evaluation.limit 40 --evaluation.final null"


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == kind]


def call(words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    # Under `make test` this is a make within a make, which would say which folder it enters and leaves.
    outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    environment = {**outer, **more, "PATH": f"{Path(sys.prefix) / 'bin'}:{outer['PATH']}"}
    return subprocess.run(words, shell=True, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone's root, in which the demonstration has run at reduced size."""
    place = tmp_path_factory.mktemp("clone")
    assert "make demo" in blocks("sh")[0]
    done = call(f'make demo VENV={sys.prefix} DEMO_OUT={place}/runs/demo DEMO_FLAGS="{SMALL}"', ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{place}/runs/demo/report.html"
    return place


# All commands in one process, so that the libraries are imported once.
COMMANDS = """
import shlex, sys
from fedrot.app.cli.main import main
for line in sys.stdin:
    print(line, end="", flush=True)
    if main(shlex.split(line)[1:]) != 0:
        sys.exit(f"failed: {line}")
"""


def test_every_shell_command_runs(workplace: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]
    mine = [command for command in commands if command.startswith("fedrot ")]
    assert len(mine) > 12
    for command in commands:
        if command not in mine:
            assert command.startswith("make ")
            done = call(f"make --dry-run {command.removeprefix('make ')}", ROOT)
            assert done.returncode == 0, done.stderr
    typed = "".join(f"{reduced(command)}\n" for command in mine)
    done = subprocess.run([sys.executable, "-c", COMMANDS], cwd=workplace, input=typed, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def reduced(command: str) -> str:
    """The command at reduced size."""
    if command.startswith("fedrot compare "):
        assert "--seeds 0,1,2" in command
        return f"{command} {SMALL}".replace("--seeds 0,1,2", "--seeds 0")
    if command.startswith("fedrot run "):
        return f"{command} {SMALL}"
    return command + (" --limit 40" if command.startswith("fedrot eval") else "")


def test_every_piece_of_python_runs(workplace: Path) -> None:
    pieces = blocks("python")
    assert len(pieces) == 4
    for code in pieces:
        done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True)
        assert done.returncode == 0, code + done.stderr
    assert (workplace / "runs" / "aligned" / "adapter_config.json").exists()
    assert (workplace / "runs" / "merged" / "adapter_model.safetensors").exists()


def test_the_recipe_it_shows_is_a_recipe() -> None:
    from fedrot.running.recipe_file import parse_recipe

    (text,) = blocks("yaml")
    assert parse_recipe(yaml.safe_load(text)).data.group == "shop"


def test_every_file_it_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT)
    assert len(links) > 4
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_printed_outputs_are_real_ones() -> None:
    plain = "".join(blocks(""))
    assert re.search(r"^test accuracy 0\.\d{4}  \(2815 examples\)$", plain, flags=re.MULTILINE)
    assert re.search(r"^\d+ passed.* in \d", plain, flags=re.MULTILINE)
    assert " failed" not in plain
    assert "@" not in plain


def test_the_picture_comes_from_the_committed_results(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import frames

    rows = frames.measure()
    committed = (ROOT / "docs" / "results" / "frames.csv").read_text().splitlines()[1:]
    assert len(rows) == len(committed)
    for row, line in zip(rows, committed, strict=True):
        variant, angle, seed, error = line.rsplit(",", 3)
        assert (row[0], str(row[1]), str(row[2])) == (variant.strip('"'), angle, seed)
        assert row[3] == pytest.approx(float(error), rel=1e-3, abs=1e-5)
    frames.draw(ROOT / "docs" / "results" / "frames.csv", tmp_path / "frames.png")
    assert (tmp_path / "frames.png").stat().st_size > 10_000
