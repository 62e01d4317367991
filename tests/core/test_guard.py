"""What the guard is for: over clients' noise, alignment under it does not raise the aggregation error."""

import math

import pytest
import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.diagnostics import exact_errors
from fedrot.core.methods.base import Broadcast, Seat
from fedrot.core.methods.rotation import FedRot
from fedrot.core.seeding import generator

CLIENTS, RANK, D_IN, D_OUT = 4, 4, 16, 12
ROUNDS = 100  # simulated independently of each other, as layers of one adapter, so that they are one batch
LAYERS = [f"round.{i:03d}" for i in range(ROUNDS)]
choices = pytest.mark.parametrize("factor", ["A", "B", "joint", "alternate"])
strengths = pytest.mark.parametrize("strength", [1.0, 0.4, "auto"])
softenings = pytest.mark.parametrize("softening", ["linear", "regularised"])


class Simulated:
    """A reference and the clients that were trained from it, `ROUNDS` times."""

    def __init__(self, regime: str, seed: int) -> None:
        self._rng = generator("guard", regime, seed)
        self.a = self.normal(RANK, D_IN) / math.sqrt(D_IN)
        self.b = 0.3 * self.normal(D_OUT, RANK)
        clients = getattr(self, regime)()
        self.reference = self._adapter(self.a, self.b)
        self.clients = [self._adapter(a, b) for a, b in clients]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(ROUNDS, *shape, generator=self._rng, dtype=torch.float64)

    def _adapter(self, a: Tensor, b: Tensor) -> Adapter:
        return Adapter({name: LoraPair(a[i], b[i], 1.0) for i, name in enumerate(LAYERS)})

    def early(self) -> list[tuple[Tensor, Tensor]]:
        """B's reference is the mean of one round's noise; the common part has only just begun to grow."""
        self.b = 0.1 * self.normal(D_OUT, RANK) / math.sqrt(CLIENTS)
        common = 0.05 * self.normal(D_OUT, RANK)
        return [
            (self.a + 0.02 * self.normal(RANK, D_IN), self.b + common + 0.1 * self.normal(D_OUT, RANK))
            for _ in range(CLIENTS)
        ]

    def isotropic(self, of_a: float = 0.1, of_b: float = 0.1, common: float = 0.05) -> list[tuple[Tensor, Tensor]]:
        """Noise alike in all directions, and a small common step."""
        together = common * self.normal(D_OUT, RANK)
        return [
            (self.a + of_a * self.normal(RANK, D_IN), self.b + together + of_b * self.normal(D_OUT, RANK))
            for _ in range(CLIENTS)
        ]

    def strong(self) -> list[tuple[Tensor, Tensor]]:
        """More noise than there is of anything else."""
        return self.isotropic(0.5, 0.5)

    def loud_b(self) -> list[tuple[Tensor, Tensor]]:
        """Noise alone, in B five times that in A."""
        return self.isotropic(0.02, 0.1, 0.0)

    def loud_a(self) -> list[tuple[Tensor, Tensor]]:
        """Noise alone, in A five times that in B."""
        return self.isotropic(0.1, 0.02, 0.0)

    def gradient(self) -> list[tuple[Tensor, Tensor]]:
        """One step of plain gradient descent each: skew(A_i A_ref^T) = -skew(B_i^T B_ref)."""
        found = []
        for _ in range(CLIENTS):
            g = self.normal(D_OUT, D_IN)
            found.append((self.a - 0.1 * self.b.mT @ g, self.b - 0.1 * g @ self.a.mT))
        return found

    def turned(self) -> list[tuple[Tensor, Tensor]]:
        """Every client has turned its frame by itself, beside a little noise."""
        found = []
        for _ in range(CLIENTS):
            k = 0.5 * self.normal(RANK, RANK)
            q = torch.linalg.matrix_exp(k - k.mT)
            a, b = self.a + 0.03 * self.normal(RANK, D_IN), self.b + 0.03 * self.normal(D_OUT, RANK)
            found.append((q.mT @ a, b @ q))
        return found

    def ratios(self, method: FedRot, number: int) -> Tensor:
        """The error after alignment over that before it, round by round."""
        seat, broadcast = Seat("x"), Broadcast(number, self.reference)
        sent = [method.client(client, broadcast, seat, generator(0)).adapter for client in self.clients]
        before, after = (exact_errors(adapters, [1.0] * CLIENTS) for adapters in (self.clients, sent))
        return torch.tensor([math.sqrt(after[name]["before2"] / before[name]["before2"]) for name in LAYERS])


def interval(ratios: Tensor) -> tuple[float, float]:
    """The mean's 95 % interval."""
    half = 1.96 * float(ratios.std()) / math.sqrt(len(ratios))
    return float(ratios.mean()) - half, float(ratios.mean()) + half


@pytest.mark.parametrize("regime", ["early", "isotropic", "strong", "gradient", "turned", "loud_a", "loud_b"])
@choices
@strengths
def test_under_the_guard_the_mean_error_ratio_is_at_most_one(regime: str, factor: str, strength: float) -> None:
    method = FedRot(strength=strength, factor=factor, guard=True)
    simulated = Simulated(regime, 0)
    for number in (1, 2) if factor == "alternate" else (1,):
        low, _ = interval(simulated.ratios(method, number))
        assert low <= 1.0 + 1e-9


@pytest.mark.parametrize("regime", ["early", "isotropic", "gradient", "turned"])
@choices
@strengths
def test_so_it_is_where_each_direction_turns_as_far_as_the_data_say(regime: str, factor: str, strength: float) -> None:
    method = FedRot(strength=strength, factor=factor, guard=True, softening="regularised")
    low, _ = interval(Simulated(regime, 1).ratios(method, 2))
    assert low <= 1.0 + 1e-9


def test_auto_has_the_guard_by_itself() -> None:
    simulated = Simulated("early", 2)
    by_itself, guarded = (simulated.ratios(FedRot(strength="auto", factor="B", guard=g), 2) for g in (False, True))
    assert torch.equal(by_itself, guarded)
    assert interval(simulated.ratios(FedRot(strength=0.25, factor="B"), 2))[0] > interval(by_itself)[1]


@pytest.mark.parametrize("strength", [1.0, 0.4])
@softenings
def test_without_the_guard_turning_b_to_its_noisy_early_reference_raises_the_error(
    strength: float, softening: str
) -> None:
    simulated = Simulated("early", 0)
    free = simulated.ratios(FedRot(strength=strength, factor="B", softening=softening), 2)
    assert interval(free)[0] > 2.0
    kept = simulated.ratios(FedRot(strength=strength, factor="B", softening=softening, guard=True), 2)
    assert interval(kept)[1] <= 1.0 + 1e-9


@pytest.mark.parametrize("factor", ["A", "B"])
def test_without_the_guard_turning_after_a_gradient_step_raises_the_error(factor: str) -> None:
    simulated = Simulated("gradient", 0)
    assert interval(simulated.ratios(FedRot(strength=1.0, factor=factor), 1))[0] > 1.02


@choices
@pytest.mark.parametrize("strength", [1.0, "auto"])
def test_the_guard_does_not_stand_in_the_way_of_frames_that_were_turned(factor: str, strength: float) -> None:
    simulated = Simulated("turned", 0)
    for number in (1, 2):
        guarded = simulated.ratios(FedRot(strength=strength, factor=factor, guard=True), number)
        free = simulated.ratios(FedRot(strength=1.0, factor=factor), number)
        assert interval(guarded)[1] < 0.05
        torch.testing.assert_close(guarded, free, rtol=0.05, atol=1e-3)
