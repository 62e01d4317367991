"""docs/flower.md: its apps run, each with what is not fedrot's as it was, and its tables say what the code says."""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from local_grid import LocalGrid
from peft import LoraConfig, get_peft_model
from torch import nn

from fedrot.core.errors import RecipeError, RunError
from fedrot.core.methods import methods
from fedrot.running.flower import FedRotStrategy
from fedrot.running.flower.strategy import served

TEXT = (Path(__file__).parents[2] / "docs" / "flower.md").read_text()
SERVER, CLIENT = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def my_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own modules: a tiny model, and a training that moves it."""
    models = ModuleType("my_app.models")

    def get_model() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        return get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)  # type: ignore[arg-type]

    def train_model(model: nn.Module, number: int) -> tuple[float, int]:
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return float(number), number + 1

    models.__dict__.update(get_model=get_model, train_model=train_model)
    monkeypatch.setitem(sys.modules, "my_app", ModuleType("my_app"))
    monkeypatch.setitem(sys.modules, "my_app.models", models)


def play(server: str, client: str) -> None:
    apps: dict[str, Any] = {}
    for code in (server, client):
        space: dict[str, Any] = {}
        exec(compile(code, "docs/flower.md", "exec"), space)
        apps[type(space["app"]).__name__] = space["app"]
    grid = LocalGrid({"one": apps["ClientApp"], "two": apps["ClientApp"]})
    apps["ServerApp"](grid, Context(1, 0, {}, RecordDict(), {"num-server-rounds": 2}))


def swapped(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


def table(head: str) -> list[str]:
    """The first column's names in the table with this first line."""
    rows = TEXT[TEXT.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [row.split("`")[1] for row in rows]


PLAIN = swapped(CLIENT, "mods=[align_mod(strength=0.4)]", "")
LINE = 'FedRotStrategy(method="fedrot", strength=0.4, '


def test_the_server_s_line_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    play(SERVER, PLAIN)
    printed = capsys.readouterr().out
    keys = re.findall(r"^\| (`fedrot-[^|]*) \|", TEXT, flags=re.MULTILINE)
    named = {key for line in keys for key in re.findall(r"`([^`]+)`", line)}
    assert set(re.findall(r"'(fedrot-[^']+)'", printed)) == named
    assert "'fedrot-replies-used': 2" in printed


def test_the_clients_line_is_enough_and_both_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    play(swapped(SERVER, LINE, "__import__('flwr').serverapp.strategy.FedAvg("), CLIENT)
    assert "train_loss" in capsys.readouterr().out
    play(swapped(SERVER, LINE, LINE + 'align="client", '), CLIENT)
    assert "'fedrot-replies-used': 2" in capsys.readouterr().out
    with pytest.raises(RunError, match="align_mod has turned it at the client"):
        play(SERVER, CLIENT)


def test_the_methods_it_offers_and_refuses_are_the_code_s() -> None:
    offered = table("| method | what the server does |")
    for name in offered:
        served(name)
    (refused,) = re.findall(r"are refused by name:\n(.*?)`fedrot run`", TEXT, flags=re.DOTALL)
    controls = {name for name, kind in methods().items() if kind.capabilities.control}
    assert set(offered) | set(re.findall(r"`(\w+)`", refused)) | controls == set(methods())
    for name in set(methods()) - set(offered):
        with pytest.raises(RecipeError, match="choose"):
            served(name)


def test_the_arguments_it_explains_are_the_strategy_s() -> None:
    own = set(inspect.signature(FedRotStrategy.__init__).parameters) - {"self", "settings"}
    assert set(table("| argument | |")) == own
