"""What travels between server and sites: a header of plain values, and one flat tensor of bytes.

A request's header says its `kind`; a reply's has `refused`, the reason, where there is nothing else. The tensors of a
message lie one after the other in its payload, in an order that kind and header determine, so a message costs by its
bytes and not by the number of its tensors. What arrives is not trusted: sizes are checked before numbers are read.
"""

import json
import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from fedrot.core.checks import TOO_LARGE
from fedrot.core.errors import FedrotError, RunError

# A header holds some numbers for each layer at most; nothing honest comes near this.
LONGEST_HEADER = 8 << 20
_FAR = TOO_LARGE**3  # sums of squares of such numbers; `check_upload` knows which number may be how large


class MessageError(FedrotError):
    """A message that cannot be understood; the text is the reason."""


class Refusal(RunError):
    """What a site does not do, or cannot; the text is for the server and holds nothing of the site's data or paths."""


def one_line(text: str) -> str:
    """What somebody else wrote, as one line that can be shown."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


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
    def refusal(cls, reason: str, **header: Any) -> "Message":
        """A reply that says why there is no other."""
        return cls({"refused": reason, **header})

    @property
    def refused(self) -> str | None:
        """Why the other side gave nothing, if it did not; one line that can be shown."""
        reason = self.header.get("refused")
        if reason is None:
            return None
        text = reason[:500] if isinstance(reason, str) else shown(reason)
        return one_line(text) or "gave no reason"

    def header_bytes(self) -> bytes:
        """The header as JSON. Raises `MessageError` where a number in it is not finite."""
        try:
            return json.dumps(self.header, allow_nan=False).encode()
        except ValueError:
            raise MessageError("the message's header holds a number that is not finite (NaN or infinite)") from None

    @classmethod
    def from_parts(cls, header: bytes, payload: Tensor) -> "Message":
        """The inverse of `header_bytes`, with the payload. Raises `MessageError`."""
        if len(header) > LONGEST_HEADER:
            raise MessageError(f"the message's header has {len(header)} bytes, more than the {LONGEST_HEADER} allowed")
        try:
            values = json.loads(header, parse_constant=_not_finite, parse_float=_finite)
        except (ValueError, RecursionError) as problem:
            raise MessageError(f"the message's header is not JSON ({str(problem)[:100]})") from None
        if not isinstance(values, dict):
            raise MessageError("the message's header is not an object of JSON")
        if payload.dtype != torch.uint8 or payload.ndim != 1:
            raise MessageError(f"the message's payload is {payload.dtype} of {payload.ndim} axes, not a row of bytes")
        return cls(values, payload)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not a finite number")


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
        raise MessageError(f"the message's {key} must be of type {kind.__name__}, got {shown(value)}")
    return value


def count_of(header: Mapping[str, Any], key: str, least: int = 0) -> int:
    """A whole number of a header. `MessageError` where it is missing, anything else, below `least` or enormous."""
    value: int = value_of(header, key, int)
    if not least <= value < TOO_LARGE:
        raise MessageError(f"the message's {key} must be a whole number of at least {least}, got {shown(value)}")
    return value


def numbers_of(header: Mapping[str, Any], key: str, known: Collection[str]) -> dict[str, float]:
    """Named numbers of a header. `MessageError` where there is anything else, or a name that is not `known`."""
    found: dict[str, float] = value_of(header, key, dict)
    only(found, known)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_FAR < value < _FAR:
            raise MessageError(f"the message's {key}: {name} must be a number, got {shown(value)}")
    return found


def only(header: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise `MessageError` where a header has keys that are not `known`."""
    for key in header:
        if key not in known:
            raise MessageError(f"the message holds {shown(key)}, which this version of fedrot does not know")


def of_round(header: Mapping[str, Any], number: int) -> None:
    """Raise `MessageError` unless the message is of this round: one of an earlier round may come late."""
    if (said := count_of(header, "round")) != number:
        raise MessageError(f"the message is of round {said}, not of round {number}")


def shown(value: object) -> str:
    """A value of a header for a line of text, however large and deep it is."""
    return reprlib.repr(value)[:60]
