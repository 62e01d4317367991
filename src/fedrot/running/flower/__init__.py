"""Flower carries the messages of runs between sites (the extra `flower`), and takes fedrot's alignment as a mod."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrot.running.flower.mod import align_mod
    from fedrot.running.flower.post import GridPost

__all__ = ["GridPost", "align_mod"]

_HOME = {"align_mod": "mod", "GridPost": "post"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedrot.running.flower' has no attribute {name!r}")
    return getattr(import_module(f"fedrot.running.flower.{_HOME[name]}"), name)
