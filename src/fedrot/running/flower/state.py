"""PEFT's state of an adapter (`get_peft_model_state_dict`) in Flower's records: read as an `Adapter`, written back."""

import re
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.errors import AdapterError

ALIGNED = "fedrot.aligned"  # the record by which `align_mod` says in a reply that its factors are turned

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")

_NUMPY = "numpy.ndarray"  # Flower's word for numpy's file format
# Read here, since numpy's own reader makes room for whatever size a header claims. numpy has no bfloat16: it travels as
# two raw bytes a number in an array that Flower is told is of that dtype, which is what the package ml_dtypes gives.
_HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\x00.{2}|\x02\x00.{4})\{'descr': '([<|]\w\d{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,12}(?:, |,)?){0,8})\), \} *\n",
    re.DOTALL,
)
_DTYPES = {
    (b"<f4", "float32"): torch.float32,
    (b"<f2", "float16"): torch.float16,
    (b"<f8", "float64"): torch.float64,
    (b"<V2", "bfloat16"): torch.bfloat16,
    (b"|V2", "bfloat16"): torch.bfloat16,
}


def read_state(record: ArrayRecord, who: str, head: bool, scales: Mapping[str, float] | None = None) -> Adapter:
    """The adapter in a record, by PEFT's keys without their prefix. With `head` all that is no factor is the head.

    Scales are 1 where `scales` does not give them by layer. Raises `AdapterError`, naming `who` and the key, where
    there are no factors, one is without its partner or twice there, an array is not whole or no floating point numbers,
    or, with `head`, a key is another factor than plain LoRA's.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    paths: dict[str, str] = {}
    for key, array in record.items():
        if match := _FACTOR.fullmatch(key):
            name = match[1].removeprefix(PREFIX)
            paths[name] = match[1]
            found, place = factors.setdefault(name, {}), match[2]
        elif not head:
            continue
        elif "lora_" in key:
            raise AdapterError(f"{who}: {key!r} is not a plain LoRA factor; only lora_A.weight and lora_B.weight are")
        else:
            found, place = rest, key.removeprefix(PREFIX)
        if place in found:
            raise AdapterError(f"{who} holds {key!r} twice, with and without PEFT's additions to names")
        found[place] = _tensor(array, f"{who}: {key!r}")
    for name, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{who} has one factor of {paths[name]} alone")
    if not factors:
        raise AdapterError(f"{who} holds no factors (keys that end in lora_A.weight and lora_B.weight)")
    scales = scales or {}
    layers = {}
    for name, pair in factors.items():
        try:
            layers[name] = LoraPair(pair["A"], pair["B"], scales.get(name, 1.0))
        except AdapterError as problem:
            raise AdapterError(f"{who}: {paths[name]}: {problem}") from None
    return Adapter(layers, rest)


def write_state(adapter: Adapter, form: ArrayRecord) -> ArrayRecord:
    """The adapter under the keys of `form`, in its order and dtypes; arrays that it does not hold are `form`'s own."""
    made = {}
    for key, array in form.items():
        if match := _FACTOR.fullmatch(key):
            pair = adapter.layers[match[1].removeprefix(PREFIX)]
            made[key] = _array((pair.a if match[2] == "A" else pair.b).to(_read_header(array, key).dtype))
        elif (name := key.removeprefix(PREFIX)) in adapter.head:
            made[key] = _array(adapter.head[name].to(_read_header(array, key).dtype))
        else:
            made[key] = array
    return ArrayRecord(made)


class _Header(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    by_column: bool
    start: int  # of the numbers


def _read_header(array: Array, who: str) -> _Header:
    match = _HEADER.match(array.data) if array.stype == _NUMPY else None
    if match is None:
        raise AdapterError(f"{who} is not an array in numpy's format")
    dtype = _DTYPES.get((match[1], array.dtype))
    if dtype is None:
        raise AdapterError(f"{who} is {array.dtype[:40]!r}; an adapter's numbers are floating point")
    shape = tuple(int(size) for size in re.findall(rb"\d+", match[3]))
    return _Header(dtype, shape, match[2] == b"True", match.end())


def _tensor(array: Array, who: str) -> Tensor:
    header = _read_header(array, who)
    count, raw = prod(header.shape) * header.dtype.itemsize, memoryview(array.data)[header.start :]
    if not count or len(raw) != count:
        raise AdapterError(f"{who} has {len(raw)} bytes of numbers, its shape asks for {count}; there must be some")
    flat = torch.frombuffer(bytearray(raw), dtype=header.dtype)
    if header.by_column:
        return flat.view(header.shape[::-1]).permute(*reversed(range(len(header.shape)))).contiguous()
    return flat.view(header.shape)


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().contiguous()
    if tensor.dtype != torch.bfloat16:
        return Array(tensor)
    raw = Array(tensor.view(torch.int16).numpy().view(np.dtype("V2")))
    return Array("bfloat16", raw.shape, raw.stype, raw.data)
