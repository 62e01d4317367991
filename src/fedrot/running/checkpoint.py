"""A run's state on disk: safetensors beside JSON, a folder a round, each complete or absent.

A round's folder is written under another name, flushed and then renamed, so a kill at any moment leaves the last
complete round in place. The JSON holds the tensors' hash: damage is seen before anything is used.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.errors import RunError
from fedrot.core.files import flush_folder, read_tensors, tensor_bytes
from fedrot.core.methods.base import Broadcast, ClientState, ServerState

FORMAT = 1
_TENSORS, _STATE = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after `rounds` complete rounds."""

    server: ServerState
    clients: Mapping[str, ClientState] = field(default_factory=dict)  # kept by clients that live in this process

    @property
    def rounds(self) -> int:
        """Number of complete rounds."""
        return self.server.broadcast.round


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int, spare: int | None = None) -> Path:
    """Write a checkpoint below `root` and drop all but the `keep` latest and the one after `spare` rounds. Raises
    `OSError`, e.g. on a full disk; what was written before is then untouched.
    """
    tensors: dict[str, Tensor] = {}
    broadcast = checkpoint.server.broadcast
    forms = {
        role: pack_adapter(adapter, role, tensors)
        for role, adapter in (
            ("adapter", broadcast.adapter),
            ("reference", broadcast.reference),
            ("base_delta", broadcast.base_delta),
            ("base_step", broadcast.base_step),
            ("variate", broadcast.variate),
        )
        if adapter is not None
    }
    tensors |= {f"memory/{name}": tensor for name, tensor in checkpoint.server.memory.items()}
    clients = sorted(checkpoint.clients)
    for number, client in enumerate(clients):
        tensors |= {f"client/{number}/{name}": t for name, t in checkpoint.clients[client].items()}
    blob = tensor_bytes(tensors)
    state = {
        "format": FORMAT,
        "rounds": checkpoint.rounds,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "forms": forms,
        "clients": clients,
    }
    root.mkdir(parents=True, exist_ok=True)
    folder, partial = root / _name(checkpoint.rounds), root / ".round.tmp"  # a run has one writer
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _write(partial / _TENSORS, blob)
        _write(partial / _STATE, json.dumps(state, indent=1).encode())
        _drop(folder)
        partial.rename(folder)
    except OSError as problem:
        shutil.rmtree(partial, ignore_errors=True)
        problem.filename = problem.filename or str(folder)  # a full disk does not say which file it was
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush_folder(root)
    for old in saved_rounds(root)[:-keep]:
        if spare is None or old.name != _name(spare):
            _drop(old)
    return folder


def _drop(folder: Path) -> None:
    """Remove a checkpoint, if it is there: under another name, so that it is complete as long as it is one."""
    gone = folder.with_name(".gone.tmp")
    with contextlib.suppress(OSError):  # what stays is in nobody's way
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def _name(rounds: int) -> str:
    return f"round-{rounds:06d}"


def saved_rounds(root: Path) -> list[Path]:
    """The complete checkpoints below `root`, oldest first."""
    found = [path for path in root.glob("round-*") if re.fullmatch(r"round-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round-")))


def load_latest(root: Path) -> Checkpoint | None:
    """The latest checkpoint, None where there is none yet. Raises `RunError` naming a damaged file and the way out."""
    found = saved_rounds(root)
    if not found:
        return None
    try:
        return _load(found[-1])
    except RunError as problem:
        older = f"delete that folder to go on from {found[-2].name}" if len(found) > 1 else "start the run anew"
        raise RunError(f"{problem}; {older}") from None


def load_round(root: Path, rounds: int) -> Checkpoint:
    """The checkpoint after so many rounds. Raises `RunError` naming a missing or damaged file."""
    return _load(root / _name(rounds))


def _load(folder: Path) -> Checkpoint:
    path = folder / _STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        expected, forms, clients = state["sha256"], state["forms"], state["clients"]
        version = state["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{path}: the checkpoint is damaged (not the JSON that was written)") from None
    if version != FORMAT:
        raise RunError(f"{path}: checkpoint format {version!r}, this version of fedrot reads {FORMAT}")
    path = folder / _TENSORS
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as problem:
        raise RunError(f"{path}: the checkpoint is damaged ({problem.strerror})") from None
    if digest != expected:
        raise RunError(f"{path}: the checkpoint is damaged (its sha256 is not the one in {_STATE})")
    tensors = read_tensors(path, RunError)
    try:
        if folder.name != _name(state["rounds"]):
            raise ValueError("it is that of another round")
        roles = {role: unpack_adapter(form, role, tensors) for role, form in forms.items()}
        broadcast = Broadcast(state["rounds"], **roles)
        states = {client: _below(f"client/{number}/", tensors) for number, client in enumerate(clients)}
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise RunError(f"{folder / _STATE}: the checkpoint is damaged ({problem})") from None
    return Checkpoint(ServerState(broadcast, _below("memory/", tensors)), states)


def pack_adapter(adapter: Adapter, role: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put an adapter's tensors among `tensors`, under names of its role; the form that they are needed with."""
    tensors |= {f"{role}/{name}": tensor for name, tensor in adapter.tensors()}
    layers = {name: [pair.scale, pair.fan_in_fan_out] for name, pair in adapter.layers.items()}
    return {"layers": layers, "head": list(adapter.head), "config": dict(adapter.config)}


def unpack_adapter(form: Mapping[str, Any], role: str, tensors: Mapping[str, Tensor]) -> Adapter:
    """The inverse of `pack_adapter`. Raises `KeyError`, `TypeError` or `ValueError` where the form is not one."""
    layers = {
        name: LoraPair(tensors[f"{role}/layers/{name}/a"], tensors[f"{role}/layers/{name}/b"], scale, flag)
        for name, (scale, flag) in form["layers"].items()
    }
    return Adapter(layers, {name: tensors[f"{role}/head/{name}"] for name in form["head"]}, form["config"])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
