"""fedrot: federated LoRA fine-tuning with aligned factors.

The public names are loaded when they are first used, so that `import fedrot` costs milliseconds and not the
seconds that torch needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrot.core.adapter import Adapter, LoraPair
    from fedrot.core.aggregate import aggregate
    from fedrot.core.alignment import align
    from fedrot.core.errors import FedrotError

__version__ = "0.1.0"
__all__ = ["Adapter", "FedrotError", "LoraPair", "__version__", "aggregate", "align"]

_HOME = {
    "Adapter": "fedrot.core.adapter",
    "LoraPair": "fedrot.core.adapter",
    "FedrotError": "fedrot.core.errors",
    "aggregate": "fedrot.core.aggregate",
    "align": "fedrot.core.alignment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedrot' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
