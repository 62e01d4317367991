"""The aggregation error of a round: what averaging factor by factor loses, before and after alignment.

For factors (A_i, B_i) with weights p_i the ideal update is sum_i p_i s B_i A_i and the averaged one is s Bbar Abar.
Their difference is exactly s sum_i p_i (B_i - Bbar)(A_i - Abar). All norms come from Gram matrices in float64 of the
centred factors: a difference of large stacked products would lose everything below 3e-8 of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from fedrot.core.adapter import Adapter, stacks
from fedrot.core.alignment import rotate_back
from fedrot.core.best_rotation import best_rotation_error2
from fedrot.core.linalg import product_norm2, product_singular_values
from fedrot.core.methods.base import Upload
from fedrot.core.products import weighted_products, wide
from fedrot.core.settings import DiagnosticsSettings
from fedrot.core.sketch import SketchedErrors

_ROUNDING = 1e-10  # relative

Result = TypeVar("Result")


@dataclass(frozen=True)
class AggregationErrors:
    """Squared Frobenius norms by layer, and whether they are estimates.

    Keys of a layer: `ideal2` = ||dW_ideal||^2, `before2` and `after2` = the squared error of factor-wise averaging
    before and after alignment, `floor2` = the squared error of the best rank-r approximation of dW_ideal, which no
    method that sends one rank-r adapter can beat; `best2`, on request, the error after the best rotation of all;
    `sent2`, where it is known, the error of what the server made of the uploads, whatever its method.
    """

    layers: Mapping[str, Mapping[str, float]]
    estimated: bool
    clients: int

    def totals(self) -> dict[str, float | bool | int]:
        """Over all layers: norms, norms relative to the ideal update, and rho where it was asked for."""
        keys = next(iter(self.layers.values())).keys()
        squares = {key[:-1]: sum(layer[key] for layer in self.layers.values()) for key in keys}
        found: dict[str, float | bool | int] = {"estimated": self.estimated, "clients": self.clients}
        for key, value in squares.items():
            found[key] = math.sqrt(value)
            if key != "ideal":
                found[f"{key}_relative"] = math.sqrt(value / squares["ideal"]) if squares["ideal"] > 0 else 0.0
        if "best" in squares:
            avoidable = math.sqrt(squares["before"]) - math.sqrt(squares["floor"])
            gained = math.sqrt(squares["before"]) - math.sqrt(squares["best"])
            # An error at the level of float64's rounding has no causes to share out.
            real = avoidable > _ROUNDING * math.sqrt(squares["ideal"])
            found["rho"] = min(1.0, max(0.0, gained) / avoidable) if real else 0.0
        return found


class Observer(Protocol):
    """Sees every upload of a round as it comes and says at its end what the averaging lost."""

    def add(self, upload: Upload, weight: float) -> None:
        """Take one upload in."""

    def result(self, sent: Sequence[Adapter] = ()) -> AggregationErrors:
        """The errors over all uploads seen. The updates of `sent` sum to what the server made of them."""


def measured(settings: DiagnosticsSettings, round: int) -> bool:
    """Whether diagnostics are taken in this round."""
    return settings.every > 0 and round % settings.every == 0


@dataclass
class Watch:
    """An observer that ends no round: where errors cannot be computed there are none, and `problem` says why."""

    observer: Observer
    problem: str | None = None

    def add(self, upload: Upload, weight: float) -> None:
        """Take one upload in."""
        self._tried(lambda: self.observer.add(upload, weight))

    def result(self, sent: Sequence[Adapter] = ()) -> AggregationErrors | None:
        """See `Observer.result`; None where that is not known, or is not finite."""
        found = self._tried(lambda: self.observer.result(sent))
        totals = None if found is None else self._tried(found.totals)
        if totals is None:
            return None
        if not all(math.isfinite(value) for value in totals.values()):
            self.problem = "its numbers are not finite"
            return None
        return found

    def _tried(self, work: Callable[[], Result]) -> Result | None:
        if self.problem is None:
            try:
                return work()
            except Exception as problem:  # whatever it is, no round depends on what is measured of it
                self.problem = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        return None


def observer(settings: DiagnosticsSettings, round: int, uploads: int, seed: int) -> Watch | None:
    """What watches a round of so many uploads; None in rounds that are not measured."""
    if not measured(settings, round):
        return None
    if uploads <= settings.exact_clients:
        return Watch(ExactErrors(settings.rho))
    return Watch(SketchObserver(settings.sketch_width, seed))


def _own(upload: Upload) -> Adapter:
    """An upload's factors before alignment."""
    return upload.unturned or rotate_back(upload.adapter, upload.rotation)


class ExactErrors:
    """Exact errors. Holds the uploads until the round ends."""

    def __init__(self, rho: bool = False) -> None:
        self._rho = rho
        self._after: list[Adapter] = []
        self._before: list[Adapter] = []
        self._weights: list[float] = []
        self._late = False  # whether products before alignment were others (`late.py`)

    def add(self, upload: Upload, weight: float) -> None:
        """Take one upload in, in the frame it came in and turned back to its client's own."""
        self._after.append(upload.adapter)
        self._before.append(_own(upload))
        self._late |= upload.unturned is not None
        self._weights.append(weight)

    def result(self, sent: Sequence[Adapter] = ()) -> AggregationErrors:
        """The errors over all uploads seen."""
        rotated = any(b is not a for b, a in zip(self._before, self._after, strict=True))
        layers = exact_errors(self._before, self._weights, self._rho)
        if rotated:
            for name, layer in exact_errors(self._after, self._weights, self._rho and self._late).items():
                if self._late:  # what the server averages is what counts
                    layers[name] = layer | {"before2": layers[name]["before2"]}
                layers[name]["after2"] = layer["after2"]
                if self._rho:  # the frames that alignment found are rotations too
                    layers[name]["best2"] = min(layers[name]["best2"], layer["after2"])
        if sent:
            for name, error2 in sent_errors(self._after, self._weights, sent).items():
                layers[name]["sent2"] = error2
        return AggregationErrors(layers, estimated=False, clients=len(self._weights))


class SketchObserver:
    """Estimated errors, in memory that does not grow with the uploads."""

    def __init__(self, width: int, seed: int) -> None:
        self._width, self._seed = width, seed
        self._sketch: SketchedErrors | None = None

    def add(self, upload: Upload, weight: float) -> None:
        """Fold one upload in, in the frame it came in and turned back to its client's own."""
        self._sketch = self._sketch or SketchedErrors(upload.adapter, self._width, self._seed)
        self._sketch.add(upload.adapter, weight, _own(upload), upload.unturned is not None)

    def result(self, sent: Sequence[Adapter] = ()) -> AggregationErrors:
        """The errors over all uploads seen."""
        if self._sketch is None:
            raise ValueError("no upload was seen")
        return AggregationErrors(self._sketch.layers(sent), estimated=True, clients=self._sketch.count)


def exact_errors(adapters: list[Adapter], weights: list[float], rho: bool = False) -> dict[str, dict[str, float]]:
    """`ideal2`, `before2` = `after2` (no rotation is known here), `floor2` and on request `best2` by layer.

    `weights` are positive and need not sum to one. Clients' scales are folded into B.
    """
    p = torch.tensor(weights, dtype=torch.float64)
    p = p / p.sum()
    found: dict[str, dict[str, float]] = {}
    for stack in stacks(adapters, torch.float64):
        a, b = stack.a, stack.b * stack.scale[..., None, None]
        root = p.sqrt().to(a.device).reshape(-1, 1, 1, 1)
        mean_a, mean_b = ((root.square() * t).sum(0) for t in (a, b))
        error2 = product_norm2(wide((b - mean_b) * root, -1), wide((a - mean_a) * root, -2))
        all_b, all_a = wide(b * root, -1), wide(a * root, -2)
        rank = a.shape[-2]
        columns = {
            "ideal2": product_norm2(all_b, all_a),
            "before2": error2,
            "after2": error2,
            "floor2": product_singular_values(all_b, all_a)[..., rank:].square().sum(-1),
        }
        if rho:
            # At the level of rounding the centred form is the more exact of the two.
            columns["best2"] = torch.minimum(best_rotation_error2(a, b, p), error2)
        listed = {key: values.tolist() for key, values in columns.items()}
        for i, name in enumerate(stack.names):
            found[name] = {key: values[i] for key, values in listed.items()}
    return found


def sent_errors(adapters: Sequence[Adapter], weights: Sequence[float], sent: Sequence[Adapter]) -> dict[str, float]:
    """||sum_i p_i s_i B_i A_i - sum of the updates of `sent`||^2 by layer; the ranks of `sent` may be any.

    The difference is taken in the joint row and column spaces, after QR, so it loses nothing but rounding.
    """
    total = sum(weights)
    found: dict[str, float] = {}
    for sums in weighted_products([(w / total, a) for w, a in zip(weights, adapters, strict=True)]):
        pairs = [[one.layers[name] for name in sums.names] for one in sent]
        b = torch.cat([sums.b, *(torch.stack([-p.scale * p.b.double() for p in layers]) for layers in pairs)], dim=-1)
        a = torch.cat([sums.a, *(torch.stack([p.a.double() for p in layers]) for layers in pairs)], dim=-2)
        error2 = product_singular_values(b, a).square().sum(-1)
        found.update(zip(sums.names, error2.tolist(), strict=True))
    return found
