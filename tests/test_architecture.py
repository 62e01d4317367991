"""docs/architecture.md: the walk-through adds a method that works, and every path it names exists."""

import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text()


@pytest.fixture
def damped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The walk-through's method in a file of its own, imported as its text says, and taken out again."""
    from fedrot.core.methods import base

    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "damped_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module("damped_method").Damped
    del base._REGISTRY["damped"], sys.modules["damped_method"]


def test_the_walk_through_adds_a_working_method(
    damped: Any, recipe_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedrot import Adapter
    from fedrot.app.cli.main import main
    from fedrot.running.folder import RunFolder

    path = recipe_file(rounds=1)
    for name, flags in (("fedit", []), ("damped", ["--method.step", "0.25"])):
        assert main(["run", str(path), "--out", str(tmp_path / name), "--method.name", name, *flags]) == 0
    start = RunFolder(tmp_path / "damped").recipe()
    assert start.method == damped(step=0.25)

    from fedrot.running.prepare import prepare

    first = dict(prepare(start).model.read().tensors())
    whole = dict(Adapter.load(tmp_path / "fedit" / "adapter").tensors())
    part = dict(Adapter.load(tmp_path / "damped" / "adapter").tensors())
    for key, tensor in part.items():
        torch.testing.assert_close(tensor, first[key] + 0.25 * (whole[key] - first[key]))

    capsys.readouterr()
    assert main(["methods"]) == 0
    assert re.search(
        r"^damped +an example +sum +- +ranks, opt, variates, merge +step=0.5$",
        capsys.readouterr().out,
        flags=re.MULTILINE,
    )
    assert main(["run", str(path), "--method.name", "damped", "--method.step", "2"]) == 2
    assert "method.step must be in (0, 1], got 2.0" in capsys.readouterr().err


def test_every_capability_is_listed() -> None:
    from fedrot.core.methods.base import Capabilities

    (listed,) = re.findall(r"\*\*Capabilities\*\* say .*?: (.*?)\. ", TEXT, flags=re.DOTALL)
    assert re.findall(r"`(\w+)`", listed) == [field.name for field in fields(Capabilities)]


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:core|learning|running|app|tests|docs|benchmarks)/[\w/.]*\w(?:\.\w+)?/?)`", TEXT))
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "src" / "fedrot" / name).exists(), name
