"""Writing files so that a reader never sees half of one, and reading safetensors with errors a user understands."""

import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fedrot.core.errors import FedrotError


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step: after a crash the file is the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        problem.filename = problem.filename or str(path)  # a full disk does not say which file it was
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def private_folder(folder: Path) -> None:
    """Make the folder for this user alone, whatever the umask; one that is there and is this user's is closed to
    others.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def remove_partial(folder: Path) -> None:
    """Remove the files and folders `.*.tmp` below `folder`, which processes left that died while they wrote or removed
    something; nobody else may be writing there.
    """
    for path in sorted(folder.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: what was renamed or removed in it stays so after a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """`tensors` as one safetensors blob. Copies are made where tensors share memory, which the format refuses."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return safetensors.torch.save(plain, metadata=metadata)


def read_tensors(path: Path, error: type[FedrotError]) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; raises `error` naming the file when it cannot be read."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise error(f"{path}: not a readable safetensors file ({reason}); it is damaged or of another format") from None
