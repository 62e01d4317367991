"""The travelling parts of an adapter as one flat float32 tensor: a message costs by its arrays more than by its bytes.

Numbers are float32 on the wire. Factors in half precision are widened, which is exact, and come back in their own
dtype; float64 is refused, since float32 would round it. The tensors are on the CPU.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.errors import AdapterError

FORMAT = 1  # of the order and the meaning of the numbers
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)  # what float32 holds exactly


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in the flat form, and a hash that two sides compare before they exchange any.

    Tensors are in the order of `Adapter.tensors`, each row by row. `schema` is of the names, shapes and dtypes, of
    every layer's scale and orientation, and of the format's version: equal hashes mean that equal numbers are equal
    adapters.
    """

    parts: frozenset[str]  # of 'a', 'b' and 'head'
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]  # where each tensor begins, and the end
    schema: str  # 32 hexadecimal digits

    @classmethod
    def of(cls, form: Adapter, parts: Collection[str]) -> "Layout":
        """The layout of the tensors of `form` that belong to `parts`. `AdapterError` where one is float64."""
        tensors = [(name, t) for name, t in form.tensors() if part_of(name) in parts]
        for name, tensor in tensors:
            if tensor.dtype not in _WIDENED:
                raise AdapterError(f"{name} is {tensor.dtype}: a packed adapter holds float32; convert it first")
        shapes = tuple(tuple(t.shape) for _, t in tensors)
        # Nine digits: alpha / r may differ in the last bits.
        layers = [[name, f"{pair.scale:.9g}", pair.fan_in_fan_out] for name, pair in sorted(form.layers.items())]
        described = json.dumps([FORMAT, [[name, list(t.shape), str(t.dtype)] for name, t in tensors], layers])
        return cls(
            parts=frozenset(parts),
            names=tuple(name for name, _ in tensors),
            shapes=shapes,
            offsets=tuple(accumulate(map(prod, shapes), initial=0)),
            schema=hashlib.blake2b(described.encode(), digest_size=16).hexdigest(),
        )

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return self.offsets[-1]

    def pack(self, adapter: Adapter) -> Tensor:  # (size,) float32
        """The adapter's numbers. `AdapterError` saying what differs where its form is not the layout's."""
        self._check(adapter)
        flat, tensors = torch.empty(self.size), dict(adapter.tensors())
        for name, view in self.split(flat).items():
            view.copy_(tensors[name].detach())
        return flat

    def unpack(self, flat: Tensor, form: Adapter) -> Adapter:
        """The adapter that was packed; tensors that do not travel are `form`'s own. The inverse of `pack`, bit for bit.

        Raises `AdapterError` where `flat` is not (size,) float32, or `form` has another layout.
        """
        self._check(form)
        tensors = dict(form.tensors())
        for name, view in self.split(flat).items():
            tensors[name] = view.to(tensors[name], copy=True)
        return form.with_tensors(tensors)

    def split(self, flat: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors by flat name, as views of `flat`. `AdapterError` unless it is (size,) of `dtype`."""
        if flat.dtype != dtype or tuple(flat.shape) != (self.size,):
            raise AdapterError(
                f"packed adapter: it must be {self.size} numbers of {dtype}, got {flat.dtype} {tuple(flat.shape)}"
            )
        pieces = (flat[start:end] for start, end in pairwise(self.offsets))
        return {name: piece.view(shape) for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)}

    def agree(self, schema: str) -> None:
        """Raise `AdapterError` unless `schema` is the layout's hash. For what the other side says of its own."""
        if schema != self.schema:
            raise AdapterError(
                f"the other side packs adapters of schema {str(schema)[:40]!r}, this one of {self.schema!r}: layers, "
                "shapes, scales, dtypes or versions of fedrot differ; start both from the same recipe and version"
            )

    def _check(self, adapter: Adapter) -> None:
        """Raise `AdapterError` with the first difference of the adapter's form."""
        other = Layout.of(adapter, self.parts)
        if other.schema == self.schema:
            return
        mine, theirs = (dict(zip(one.names, one.shapes, strict=True)) for one in (self, other))
        for name in mine | theirs:
            if name not in theirs:
                raise AdapterError(f"packed adapter: {name} is missing")
            if name not in mine:
                raise AdapterError(f"packed adapter: {name} is not in the layout")
            if mine[name] != theirs[name]:
                raise AdapterError(f"packed adapter: {name} has shape {theirs[name]}, the layout has {mine[name]}")
        raise AdapterError("packed adapter: the layers, their scales, fan_in_fan_out or dtypes are not the layout's")
