"""Flower (the extra `flower`) carries messages between sites; and a mod and a strategy for Flower apps of your own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrot.running.flower.mod import align_mod
    from fedrot.running.flower.post import GridPost
    from fedrot.running.flower.strategy import FedRotStrategy

__all__ = ["FedRotStrategy", "GridPost", "align_mod"]

_HOME = {"align_mod": "mod", "GridPost": "post", "FedRotStrategy": "strategy"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedrot.running.flower' has no attribute {name!r}")
    return getattr(import_module(f"fedrot.running.flower.{_HOME[name]}"), name)
