"""What travels between server and sites: a header of plain values, and one flat tensor of bytes.

A request's header says its `kind`; a reply's has `refused`, the reason, where there is nothing else. The tensors of a
message lie one after the other in its payload, in an order that kind and header determine, so a message costs by its
bytes and not by the number of its tensors. What arrives is not trusted: sizes are checked before numbers are read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedrot.core.errors import FedrotError

# A header holds some numbers for each layer at most; nothing honest comes near this.
_LONGEST_HEADER = 8 << 20


class MessageError(FedrotError):
    """A message that cannot be understood; the text is the reason."""


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Message:
    """A request or a reply."""

    header: Mapping[str, Any]  # as JSON holds it
    payload: Tensor = field(default_factory=_nothing)  # (n,) uint8

    @classmethod
    def of(cls, payload: Sequence[Tensor] = (), **header: Any) -> "Message":
        """The tensors' bytes, one after the other, under a header."""
        parts = [tensor.contiguous().flatten().view(torch.uint8) for tensor in payload]
        return cls(header, torch.cat(parts) if parts else _nothing())

    @classmethod
    def refusal(cls, reason: str) -> "Message":
        """A reply that says why there is no other."""
        return cls({"refused": reason})

    @property
    def refused(self) -> str | None:
        """Why the other side gave nothing, if it did not."""
        reason = self.header.get("refused")
        return None if reason is None else str(reason)[:1000]

    def header_bytes(self) -> bytes:
        """The header as JSON."""
        return json.dumps(self.header, allow_nan=False).encode()

    @classmethod
    def from_parts(cls, header: bytes, payload: Tensor) -> "Message":
        """The inverse of `header_bytes`, with the payload. Raises `MessageError`."""
        if len(header) > _LONGEST_HEADER:
            raise MessageError(f"the message's header has {len(header)} bytes, more than the {_LONGEST_HEADER} allowed")
        try:
            values = json.loads(header)
        except (ValueError, RecursionError) as problem:
            raise MessageError(f"the message's header is not JSON ({str(problem)[:100]})") from None
        if not isinstance(values, dict):
            raise MessageError("the message's header is not an object of JSON")
        if payload.dtype != torch.uint8 or payload.ndim != 1:
            raise MessageError(f"the message's payload is {payload.dtype} of {payload.ndim} axes, not a row of bytes")
        return cls(values, payload)


class Reader:
    """Takes a payload apart: each call gives the next tensor."""

    def __init__(self, message: Message) -> None:
        self._payload, self._place = message.payload, 0

    def numbers(self, count: int) -> Tensor:  # (count,) float32
        """The next `count` numbers, a copy. `MessageError` where the payload is shorter."""
        return self.bytes(4 * count).view(torch.float32)

    def bytes(self, count: int) -> Tensor:  # (count,) uint8
        """The next `count` bytes, a copy: numbers need not lie in a message where they may in memory."""
        end = self._place + count
        if end > len(self._payload):
            raise MessageError(f"the message's payload has {len(self._payload)} bytes, at least {end} are needed")
        found = self._payload[self._place : end].clone()
        self._place = end
        return found

    def end(self) -> None:
        """Raise `MessageError` unless all has been read."""
        if self._place != len(self._payload):
            raise MessageError(f"the message's payload has {len(self._payload)} bytes, {self._place} are expected")


def value_of(header: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value of a header. `MessageError` where it is missing or of another kind; True is no number."""
    value = header.get(key)
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not good:
        raise MessageError(f"the message's {key} must be of type {kind.__name__}, got {repr(value)[:60]}")
    return value


def numbers_of(header: Mapping[str, Any], key: str) -> dict[str, float]:
    """Named numbers of a header. `MessageError` where there is anything else."""
    found = value_of(header, key, dict)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise MessageError(f"the message's {key}: {name[:60]} must be a number, got {repr(value)[:60]}")
    return found
