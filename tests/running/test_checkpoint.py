"""Checkpoints: all that a run knows comes back bit for bit; damage is named; a crash loses nothing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import first_adapter

from fedrot.core.errors import RunError
from fedrot.core.methods.base import Broadcast, ServerState
from fedrot.running.checkpoint import Checkpoint, load_latest, save_checkpoint, saved_rounds


def make(rounds: int, seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    broadcast = Broadcast(
        round=rounds,
        adapter=first_adapter(seed=seed),
        reference=first_adapter(seed=seed + 1),
        base_delta=first_adapter(rank=3, seed=seed + 2),
    )
    clients = {"site/a": {"head/classifier.weight": torch.randn(3, 5)}, "site b": {"method/b": torch.randn(2)}}
    return Checkpoint(ServerState(broadcast, {"momentum": torch.randn(4)}), clients)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    def flat(c: Checkpoint) -> dict[str, torch.Tensor]:
        b = c.server.broadcast
        found = {f"memory/{k}": v for k, v in c.server.memory.items()}
        for role, adapter in (("adapter", b.adapter), ("reference", b.reference), ("delta", b.base_delta)):
            if adapter is not None:
                found |= {f"{role}/{k}": v for k, v in adapter.tensors()}
        return found | {f"{name}/{k}": v for name, state in c.clients.items() for k, v in state.items()}

    mine, theirs = flat(one), flat(other)
    forms = [[(p.scale, p.fan_in_fan_out) for p in c.server.broadcast.adapter.layers.values()] for c in (one, other)]
    return (
        one.rounds == other.rounds
        and forms[0] == forms[1]
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[k], theirs[k]) for k in mine)
    )


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(4), keep=2)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert same(loaded, make(4))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none") is None


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    for rounds in range(1, 12):
        save_checkpoint(tmp_path, make(rounds), keep=3)
    assert [path.name for path in saved_rounds(tmp_path)] == ["round-000009", "round-000010", "round-000011"]
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.rounds == 11


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_named_with_the_way_out(tmp_path: Path, file: str, damage: str) -> None:
    save_checkpoint(tmp_path, make(1), keep=2)
    latest = save_checkpoint(tmp_path, make(2), keep=2)
    path = latest / file
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(RunError) as caught:
        load_latest(tmp_path)
    message = str(caught.value)
    assert str(path) in message
    assert "damaged" in message
    assert "delete that folder to go on from round-000001" in message
    assert "\n" not in message


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, make(1), keep=2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(RunError, match="format 99"):
        load_latest(tmp_path)


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("function", ["fsync", "rename", "open"])
@pytest.mark.parametrize("at", range(4))
def test_a_crash_at_any_step_of_saving_keeps_the_round_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, at: int
) -> None:
    save_checkpoint(tmp_path, make(1), keep=1)
    calls = 0
    original: Any = getattr(os, function) if function != "rename" else Path.rename

    def crashing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise Crash
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path if function == "rename" else os, function, crashing)
        try:
            save_checkpoint(tmp_path, make(2), keep=1)
        except Crash:
            pass
        else:
            assert calls <= at, "the crash was swallowed"
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert same(loaded, make(loaded.rounds))
    assert loaded.rounds in (1, 2)


def test_a_full_disk_leaves_the_last_round_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, make(1), keep=2)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, make(2), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert same(loaded, make(1))


def test_nothing_is_unpickled_from_a_checkpoint(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, make(1), keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]
