"""Rounds between sites give what the embedded engine gives, whatever the method keeps, sends or asks."""

from pathlib import Path
from typing import Any

import pytest
from network_sites import ONE_BY_ONE, LocalPost, deployed, divide_files
from tiny_runs import Tiny, assert_equal, begin

from fedrot.core.methods import methods
from fedrot.running.client import keeps_state

PRIVATE = ("--privacy.clip=1", "--privacy.noise=0.1", "--privacy.delta=0.1", "--federation.weighting=uniform")
UNSCORED = ("--evaluation.every=0", "--evaluation.final=null")
OVER_A_NETWORK = sorted(name for name, method in methods().items() if not method.capabilities.pooled)


def both(
    values: dict[str, Any], data: Path, tmp_path: Path, *flags: str, rounds: int = 3
) -> tuple[Tiny, Tiny, LocalPost]:
    """The same rounds in this process and between sites."""
    here = begin(values, *ONE_BY_ONE, *flags).play(rounds)
    post = LocalPost(divide_files(data, tmp_path / "sites"), tmp_path / "memory")
    there = deployed(values, post, *flags).play(rounds)
    assert keeps_state(here.recipe) == bool(here.engine.states())
    return here, there, post


@pytest.mark.parametrize("method", OVER_A_NETWORK)
def test_every_method_gives_the_adapter_of_the_simulation(
    method: str, tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    here, there, _ = both(tiny_values, tiny_data, tmp_path, "--method.name", method)
    assert_equal(there.adapter, here.adapter)
    mine, theirs = (tiny.state.broadcast.base_delta for tiny in (there, here))
    assert (mine is None) == (theirs is None)
    if mine is not None and theirs is not None:
        assert_equal(mine, theirs)
    scores = [[record["evaluation"]["accuracy"] for record in tiny.records] for tiny in (there, here)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


@pytest.mark.parametrize(
    "flags",
    [
        ("--lora.head", "personal"),
        ("--lora.head", "frozen"),
        ("--local.scaffold", "true"),
        ("--server.optimizer", "adam"),
        ("--lora.ranks", '{"books": 1}'),
        ("--federation.participation", "0.67"),
        ("--federation.compression", "int8"),
        ("--federation.compression", "bf16", "--federation.feedback", "false"),
        ("--diagnostics.every", "0"),
        ("--privacy.mode", "local", *PRIVATE, *UNSCORED),
        ("--privacy.mode", "central", *PRIVATE),
        ("--robust.rule", "norm", "--federation.compression", "int8"),
    ],
    ids=lambda flags: " ".join(flags).replace("--", ""),
)
def test_so_does_every_setting(
    flags: tuple[str, ...], tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    here, there, _ = both(tiny_values, tiny_data, tmp_path, *flags)
    assert_equal(there.adapter, here.adapter)
    drop = {"seconds", "evaluation"}
    for mine, theirs in zip(there.records, here.records, strict=True):
        assert mine["clients"] == theirs["clients"]
        assert mine.get("train") == theirs.get("train")
        assert mine.keys() - drop == theirs.keys() - drop
