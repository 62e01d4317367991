"""An adapter in memory: LoRA factors by layer, other trained tensors, and what PEFT needs to rebuild it.

No aggregation code sees a raw state dict, a model or a file: it sees an `Adapter`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrot.core.errors import AdapterError


@dataclass(frozen=True)
class LoraPair:
    """One layer's LoRA update `scale * b @ a` of a base weight.

    The factors keep the same orientation whatever the base layer is: `fan_in_fan_out` says that the base stores its
    weight as (d_in, d_out), as GPT-2's Conv1D does, so that the update must be transposed before it is added.

    Raises `AdapterError` (a `ValueError`) when the factors are not two matrices of one rank and one kind of float.
    """

    a: Tensor  # (r, d_in)
    b: Tensor  # (d_out, r)
    scale: float
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2:
            raise AdapterError(
                f"LoRA factors must be matrices, got a {tuple(self.a.shape)} and b {tuple(self.b.shape)}"
            )
        if self.a.shape[0] != self.b.shape[1]:
            raise AdapterError(
                f"LoRA factors of different rank: a {tuple(self.a.shape)} has rank {self.a.shape[0]}, "
                f"b {tuple(self.b.shape)} has rank {self.b.shape[1]}"
            )
        if 0 in (*self.a.shape, *self.b.shape):
            raise AdapterError(f"empty LoRA factor: a {tuple(self.a.shape)}, b {tuple(self.b.shape)}")
        if not (self.a.is_floating_point() and self.b.is_floating_point()):
            raise AdapterError(f"LoRA factors must be floating point, got {self.a.dtype} and {self.b.dtype}")
        if self.a.dtype != self.b.dtype:
            raise AdapterError(f"LoRA factors of different dtype: a is {self.a.dtype}, b is {self.b.dtype}")

    @property
    def rank(self) -> int:
        """The number of rows of a and columns of b."""
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """The dense update in the orientation of the base weight, (d_out, d_in) or transposed; for tests and export."""
        update = self.scale * (self.b @ self.a)
        return update.T if self.fan_in_fan_out else update


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by layer, the head, and the settings that adapter_config.json holds.

    `layers` maps the base model's module path (without PEFT's `base_model.model.` prefix) to its pair. `head` maps
    parameter paths of the modules that were trained in full (PEFT's modules_to_save) to their tensors.
    """

    layers: Mapping[str, LoraPair]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read a PEFT adapter directory. Raises `AdapterError` with one line that names the file or the key."""
        from fedrot.core.peft_format import load_adapter

        return load_adapter(Path(path))

    def save(self, path: str | Path) -> None:
        """Write a PEFT adapter directory, loadable by `peft.PeftModel.from_pretrained`; see `Adapter.load`."""
        from fedrot.core.peft_format import save_adapter

        save_adapter(self, Path(path))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Adapter":
        """The same adapter with `change` applied to every tensor, factors and head."""
        layers = {n: replace(p, a=change(p.a), b=change(p.b)) for n, p in self.layers.items()}
        return replace(self, layers=layers, head={n: change(t) for n, t in self.head.items()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under a flat name: `layers/<path>/a`, `layers/<path>/b`, `head/<path>`, in a fixed order."""
        for name in sorted(self.layers):
            yield f"layers/{name}/a", self.layers[name].a
            yield f"layers/{name}/b", self.layers[name].b
        for name in sorted(self.head):
            yield f"head/{name}", self.head[name]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Adapter":
        """The inverse of `tensors()`: this adapter's form, filled with `tensors`. Missing names raise `KeyError`."""
        layers = {
            name: replace(pair, a=tensors[f"layers/{name}/a"], b=tensors[f"layers/{name}/b"])
            for name, pair in self.layers.items()
        }
        return replace(self, layers=layers, head={name: tensors[f"head/{name}"] for name in self.head})

    def bytes(self, parts: frozenset[str] = frozenset({"a", "b", "head"})) -> int:
        """Bytes of the tensors that belong to `parts` ('a', 'b', 'head') as they travel: in float32 (`packed.py`)."""
        return 4 * sum(t.numel() for name, t in self.tensors() if part_of(name) in parts)


def part_of(name: str) -> str:
    """The part, 'a', 'b' or 'head', that a flat tensor name of `Adapter.tensors` belongs to."""
    return "head" if name.startswith("head/") else name.rsplit("/", 1)[1]


# Stacks are copies; this many numbers (256 MiB of float64) is the most that one of them holds.
_STACK_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Stack:
    """Layers of one shape, from one or more adapters of one form, side by side for batched mathematics."""

    names: tuple[str, ...]  # L layer names
    a: Tensor  # (N, L, r, d_in)
    b: Tensor  # (N, L, d_out, r)
    scale: Tensor  # (N, L)


def stacks(adapters: Sequence[Adapter], dtype: torch.dtype) -> Iterator[Stack]:
    """The layers of `adapters`, which must have one form, grouped by shape and stacked as `dtype`."""
    first = adapters[0]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, pair in first.layers.items():
        groups.setdefault((*pair.a.shape, *pair.b.shape), []).append(name)
    for shape, together in groups.items():
        size = len(adapters) * (shape[0] * shape[1] + shape[2] * shape[3])
        chunk = max(1, _STACK_ELEMENTS // size)
        for names in (together[i : i + chunk] for i in range(0, len(together), chunk)):
            yield _stack(adapters, names, dtype)


def _stack(adapters: Sequence[Adapter], names: Sequence[str], dtype: torch.dtype) -> Stack:
    pairs = [adapter.layers[name] for adapter in adapters for name in names]
    lead = (len(adapters), len(names))
    return Stack(
        names=tuple(names),
        a=torch.stack([p.a.detach().to(dtype) for p in pairs]).unflatten(0, lead),
        b=torch.stack([p.b.detach().to(dtype) for p in pairs]).unflatten(0, lead),
        scale=torch.tensor([p.scale for p in pairs], dtype=dtype, device=pairs[0].a.device).unflatten(0, lead),
    )


def same_form(adapter: Adapter, reference: Adapter, who: str = "adapter", other: str = "the reference") -> None:
    """Raise `AdapterError` unless both have the same layers and head, each of the same shapes."""
    for kind, mine, theirs in (
        ("layer", set(adapter.layers), set(reference.layers)),
        ("head tensor", set(adapter.head), set(reference.head)),
    ):
        if missing := sorted(theirs - mine):
            raise AdapterError(f"{who}: {kind} {missing[0]!r} is missing")
        if extra := sorted(mine - theirs):
            raise AdapterError(f"{who}: {kind} {extra[0]!r} is not in {other}")
    form = dict(reference.tensors())
    for name, tensor in adapter.tensors():
        if tensor.shape != form[name].shape:
            raise AdapterError(f"{who}: {name} has shape {tuple(tensor.shape)}, {other} has {tuple(form[name].shape)}")


def same_update(adapter: Adapter, reference: Adapter, who: str) -> None:
    """Raise `AdapterError` unless equal factors mean equal updates: the same scales, but for the rounding of alpha / r,
    and the same orientation, layer by layer. The layers are those of `reference` (see `same_form`).
    """
    for name, pair in reference.layers.items():
        mine = adapter.layers[name]
        if not math.isclose(mine.scale, pair.scale, rel_tol=1e-9):
            raise AdapterError(f"{who}: layer {name!r} has scale {mine.scale} (alpha / r), not {pair.scale}")
        if mine.fan_in_fan_out != pair.fan_in_fan_out:
            raise AdapterError(
                f"{who}: layer {name!r} has fan_in_fan_out {mine.fan_in_fan_out}: it fits other base layers"
            )
