"""Aggregation errors of many clients from a streamed random sketch, in O(d k) memory whatever their number.

With Gaussian Omega of k columns, E ||E Omega||_F^2 / k = ||E||_F^2 for every matrix E. The ideal update enters only as
sum_i p_i B_i (A_i Omega) and, for the floor, as Psi sum_i p_i B_i A_i: both are sums over clients, and the same before
and after alignment, which turns a client's factors and leaves their product. Of late uploads (`late.py`) it does not:
what their products were before is summed too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.seeding import generator


class _Layer:
    """One layer's sums."""

    def __init__(self, pair: LoraPair, width: int, seed: int, name: str) -> None:
        (r, d_in), d_out = pair.a.shape, pair.b.shape[0]
        rng = generator(seed, "sketch", name)
        # `width` test columns measure norms, `span` columns find the leading left singular space, and the rows of psi
        # see the update from its other side: a one-pass low-rank approximation (Tropp et al. 2017, alg. 7). It is near
        # the best one from above, so the floor is an upper estimate.
        self.rank, self.width, span = r, width, min(4 * r + 32, d_in, d_out)
        self.omega = torch.randn(d_in, width + span, generator=rng, dtype=torch.float64)
        self.psi = torch.randn(min(2 * span + 1, d_out), d_out, generator=rng, dtype=torch.float64)
        self.right = torch.zeros(d_out, width + span, dtype=torch.float64)  # sum w_i s_i B_i A_i omega
        self.shift = torch.zeros(d_out, width, dtype=torch.float64)  # what the same sum was more before alignment
        self.left = torch.zeros(self.psi.shape[0], d_in, dtype=torch.float64)  # sum w_i s_i psi B_i A_i
        self.means = {  # of the factors, as they came and turned back
            when: (torch.zeros(r, d_in, dtype=torch.float64), torch.zeros(d_out, r, dtype=torch.float64))
            for when in ("after", "before")
        }

    def add(self, pair: LoraPair, before: LoraPair, weight: float, changed: bool) -> None:
        a, b = _factors(pair)
        self.right.addmm_(b, a @ self.omega, alpha=weight)
        if changed:
            omega = self.omega[:, : self.width]
            was_a, was_b = _factors(before)
            self.shift.addmm_(was_b, was_a @ omega, alpha=weight).addmm_(b, a @ omega, alpha=-weight)
        self.left.addmm_(self.psi @ b, a, alpha=weight)
        for when, (one, other) in (("after", (a, b)), ("before", (a, b) if before is pair else _factors(before))):
            self.means[when][0].add_(one, alpha=weight)
            self.means[when][1].add_(other, alpha=weight)

    def squares(self, total: float, sent: Sequence[LoraPair]) -> dict[str, float]:
        right, left = self.right / total, self.left / total
        test, omega = right[:, : self.width], self.omega[:, : self.width]
        ideal = {"after": test, "before": test + self.shift / total}
        errors2 = {
            when: self._norm2(ideal[when] - (b / total) @ ((a / total) @ omega)) for when, (a, b) in self.means.items()
        }
        same = () if bool(self.shift.any()) else (errors2["before"],)  # of another update it is no bound
        best_b, best_a = self._best_rank_r(right[:, self.width :], left)
        made = sum((p.scale * (p.b.cpu().double() @ (p.a.cpu().double() @ omega)) for p in sent), torch.zeros(()))
        found = {} if not sent else {"sent2": self._norm2(test - made)}
        return {
            **found,
            "ideal2": self._norm2(test),
            "before2": errors2["before"],
            "after2": errors2["after"],
            # No rank-r average is below the floor, and the averaged factors are themselves of rank r.
            "floor2": min(self._norm2(test - best_b @ (best_a @ omega)), errors2["after"], *same),
        }

    def _norm2(self, image: Tensor) -> float:
        return float(image.square().sum()) / self.width

    def _best_rank_r(self, image: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        q, _ = torch.linalg.qr(image)
        core = torch.linalg.lstsq(self.psi @ q, left, driver="gelsd").solution  # (span, d_in): update ~ q core
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        r = self.rank
        return q @ (u[:, :r] * s[:r]), vh[:r]


def _factors(pair: LoraPair) -> tuple[Tensor, Tensor]:
    return pair.a.detach().cpu().double(), pair.b.detach().cpu().double() * pair.scale


class SketchedErrors:
    """Streamed estimates of a round's squared norms, by layer; see `diagnostics.AggregationErrors` for the keys."""

    def __init__(self, form: Adapter, width: int, seed: int) -> None:
        self._layers = {name: _Layer(pair, width, seed, name) for name, pair in form.layers.items()}
        self._total = 0.0
        self.count = 0

    def add(self, adapter: Adapter, weight: float, before: Adapter | None = None, changed: bool = False) -> None:
        """Fold one client's factors in; `before` are the same ones before they were turned, if they were, and have
        other products where they are `changed`.
        """
        before = before or adapter
        for name, layer in self._layers.items():
            layer.add(adapter.layers[name], before.layers[name], weight, changed)
        self._total += weight
        self.count += 1

    def layers(self, sent: Sequence[Adapter] = ()) -> dict[str, dict[str, float]]:
        """The estimates over all clients seen; see `diagnostics.Observer.result` for `sent`."""
        return {
            name: layer.squares(self._total, [one.layers[name] for one in sent]) for name, layer in self._layers.items()
        }
