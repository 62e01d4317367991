"""Weighted changes as whole numbers, whose sum is exact in any order and which a mask can hide one by one.

What a secure sum adds up is integers modulo a power of two (Bonawitz et al., CCS 2017). A client's number x, its change
from what was broadcast, becomes q = floor(w clip(x, R) K / (M R) + u) modulo 2^32: w is the client's weight, R the
range, M the most that all weights can add up to, u uniform in [0, 1), so that the rounding has no bias. It is the
weighted number that is rounded, so the sum needs no more room for many examples than for few.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.checks import RejectedUpload
from fedrot.core.errors import FedrotError

# The largest sum of honest numbers, K. Sums lie within a sixteenth of the modulus: a number that is anything but a sum
# of honest ones falls outside it fifteen times of sixteen.
_LARGEST = 2**27
MOST_WEIGHT = 2**31 - 1  # of all clients together
_LOSS_STEPS, _LARGEST_LOSS = 2**16, 2**15  # a larger loss counts as this

COUNTS = ("weight", "clipped", "rows", "tokens", "loss")


@dataclass(frozen=True)
class Summand:
    """One client's numbers and counts, or the sum of several clients'; a sum wraps round like the masks on it."""

    numbers: NDArray[np.uint32]  # (size,)
    counts: NDArray[np.uint64]  # (5,): COUNTS

    def __add__(self, other: "Summand") -> "Summand":
        """The sum modulo 2^32, and of the counts modulo 2^64."""
        return Summand(self.numbers + other.numbers, self.counts + other.counts)

    def payload(self) -> Tensor:  # (bytes_of(size),) uint8
        """As it travels."""
        parts = (self.numbers.astype("<u4"), self.counts.astype("<u8"))
        return torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts]))

    @classmethod
    def of(cls, payload: Tensor, size: int) -> "Summand":
        """The inverse of `payload`, a copy; its length is `bytes_of(size)`."""
        row = payload.numpy()
        return cls(row[: 4 * size].copy().view("<u4"), row[4 * size :].copy().view("<u8"))


def bytes_of(size: int) -> int:
    """Bytes of a summand of `size` numbers as it travels."""
    return 4 * size + 8 * len(COUNTS)


@dataclass(frozen=True)
class Mean:
    """What a sum tells."""

    change: Tensor  # (size,) float64: the clients' weighted mean change
    weight: int  # of all of them together
    clipped: float  # share of their numbers that lay beyond the range
    reports: Mapping[str, float]  # loss: the weighted mean; rows, tokens: sums. Empty where clients report nothing


@dataclass(frozen=True)
class Scale:
    """How numbers become whole ones. All clients of a sum and its server have the same. `FedrotError` for weights that
    cannot be summed.
    """

    bound: float  # R
    total: int  # M

    def __post_init__(self) -> None:
        if not 0 < self.total <= MOST_WEIGHT:
            raise FedrotError(
                f"the weights of a secure sum may add up to anything from 1 to {MOST_WEIGHT}, these to {self.total}; "
                "set federation.weighting uniform"
            )

    def summand(
        self,
        change: Tensor,  # (size,) float64
        weight: int,
        reports: Mapping[str, float],
        rng: torch.Generator,
    ) -> Summand:
        """A client's part of the sum; `reports` may hold its loss, rows and tokens. `FedrotError` where a number is not
        finite or the weight is above `total`.
        """
        if not 0 < weight <= self.total:
            raise FedrotError(f"its weight in the secure sum is {weight}, and all together have {self.total}")
        if not bool(torch.isfinite(change).all()):
            raise FedrotError("its change holds values that are not finite (NaN or infinite)")
        scaled = change.clamp(-self.bound, self.bound) * (weight * _LARGEST / (self.total * self.bound))
        whole = (scaled + torch.rand(change.shape, generator=rng, dtype=torch.float64)).floor().long()
        loss = min(max(reports.get("loss", 0.0), 0.0), float(_LARGEST_LOSS))
        counts = {
            "weight": weight,
            "clipped": int((change.abs() > self.bound).sum()),
            "rows": int(reports.get("rows", 0)),
            "tokens": int(reports.get("tokens", 0)),
            "loss": round(weight * loss * _LOSS_STEPS),
        }
        numbers = (whole & 0xFFFFFFFF).numpy().astype(np.uint32)
        return Summand(numbers, np.array([counts[key] for key in COUNTS], dtype=np.uint64))

    def mean(self, summed: Summand, clients: int, weight: int | None = None) -> Mean:
        """What the sum of so many clients tells; `weight` is what they weigh together, where that is known.

        Raises `RejectedUpload` where it is not a sum of what clients may send: the weight is not theirs, a mean lies
        beyond the range, or a count is larger than it can be.
        """
        counts = {key: int(value) for key, value in zip(COUNTS, summed.counts, strict=True)}
        found, size = counts["weight"], len(summed.numbers)
        if not 0 < found <= self.total or weight not in (None, found):
            wanted = f"from 1 to {self.total}" if weight is None else str(weight)
            raise RejectedUpload(f"the secure sum's weight is {found}, not {wanted}")
        whole = summed.numbers.astype(np.int64)
        whole[whole >= 2**31] -= 2**32
        most = _LARGEST * found / self.total + clients  # each client's rounding adds less than one
        if beyond := int((np.abs(whole) > most).sum()):
            raise RejectedUpload(f"the secure sum has {beyond} of {size} means beyond secure.range {self.bound:g}")
        limits = {
            "clipped": clients * size,
            "rows": 2**53,
            "tokens": 2**53,
            "loss": found * _LARGEST_LOSS * _LOSS_STEPS,
        }
        for key, limit in limits.items():
            if counts[key] > limit:
                raise RejectedUpload(f"the secure sum's count of {key} is {counts[key]}, above the {limit} possible")
        reports = {"loss": counts["loss"] / _LOSS_STEPS / found, "rows": counts["rows"], "tokens": counts["tokens"]}
        change = torch.from_numpy(whole).double() * (self.total * self.bound / (_LARGEST * found))
        share = counts["clipped"] / max(1, clients * size)
        return Mean(change, found, share, reports if counts["rows"] else {})
