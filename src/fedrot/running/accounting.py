"""What rounds cost in privacy: epsilon after so many of them, and how many a budget allows.

Epsilon is a function of recipe, clients and number of rounds, so a resumed run needs no memory of it, and a budget is a
number of rounds that is known before the first one. Rényi differential privacy of the Gaussian mechanism, of which each
client's term is there with a known probability (Mironov et al., arXiv 1908.10530), adds up over rounds and gives
epsilon at the recipe's delta (Balle et al., arXiv 1905.09982). Both come from Opacus and are upper bounds.

central   a federation and the same one in which a client never gives anything: its term of the sum, of norm C at most,
          is there or not, so the noise is z times what one client can change.
local     a client's data and any other data: its change may be any other one of norm C at most, 2 C away, so the noise
          is z / 2 times that. The server sees who sent what, so no chance of not being drawn helps; a client pays for
          the rounds in which it was drawn, and epsilon is that of the client drawn most often.
"""

import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

from fedrot.core.errors import RecipeError
from fedrot.running.draws import by_chance, draw_clients
from fedrot.running.recipe import Recipe

# Opacus' own orders, and some beyond them for very much and very little noise.
_ORDERS = [1.01, 1.02, 1.05, *(1 + k / 10 for k in range(1, 100)), *range(11, 64), *(2**k for k in range(6, 11))]


class Accountant:
    """The cost of a private recipe's rounds."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises `RecipeError` where the accounting is not installed, or the budget is not enough for one round."""
        settings = recipe.privacy
        if settings.noise is None or settings.delta is None:
            raise ValueError("an accountant is for recipes with privacy.mode central or local")
        self._recipe, self._delta = recipe, settings.delta
        self._noise = settings.noise / 2 if settings.mode == "local" else settings.noise
        self._chance = recipe.federation.participation if by_chance(recipe) else 1.0
        first = self.epsilon(1)
        if settings.budget is not None and first > settings.budget:
            raise RecipeError(
                f"privacy.budget: one round costs epsilon {first:.3g}, the budget is {settings.budget:g}; raise "
                "privacy.noise or the budget"
            )

    @cached_property
    def _round(self) -> Any:  # (orders,) Rényi differential privacy of one round
        return _opacus().compute_rdp(q=self._chance, noise_multiplier=self._noise, steps=1, orders=_ORDERS)

    def epsilon(self, times: int) -> float:
        """Epsilon of a client that took part so many times, or could have, by chance. Infinite without noise."""
        if times == 0:
            return 0.0
        if self._noise == 0:
            return float("inf")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the best order being the last one: a bound it is all the same
            found, _ = _opacus().get_privacy_spent(orders=_ORDERS, rdp=times * self._round, delta=self._delta)
        return max(0.0, float(found))

    def by_round(self, clients: Sequence[str]) -> list[float]:
        """Epsilon after 1, 2, ... rounds, as many as the recipe asks for and the budget allows. Raises `RecipeError`
        where delta, or the expected number of clients in a round, means nothing for so many clients.
        """
        recipe = self._recipe
        if self._delta * len(clients) >= 1:
            raise RecipeError(
                f"privacy.delta is {self._delta:g}: from one over the number of clients on, 1 / {len(clients)}, it "
                "allows giving one of them away; set it well below that"
            )
        if self._chance * len(clients) < 1:
            raise RecipeError(
                f"federation.participation: of {len(clients)} clients fewer than one would be drawn a round; raise it"
            )
        spent = [self.epsilon(times) for times in self._times(clients)]
        budget = recipe.privacy.budget
        return spent if budget is None else spent[: bisect_right(spent, budget)]

    def _times(self, clients: Sequence[str]) -> list[int]:
        """What `epsilon` counts, after 1, 2, ... rounds."""
        recipe = self._recipe
        if recipe.privacy.mode == "central" or recipe.federation.participation == 1:
            return list(range(1, recipe.rounds + 1))
        drawn: Counter[str] = Counter()
        most = []
        for number in range(recipe.rounds):
            drawn.update(draw_clients(clients, recipe.federation.participation, recipe.seed, number))
            most.append(max(drawn.values()))
        return most


def described(recipe: Recipe, spent: Sequence[float]) -> str:
    """What a private run promises and when it ends, in a line for the log; `spent` is what `by_round` gave."""
    settings = recipe.privacy
    source = "the system's generator" if settings.secure else "the recipe's seed (a simulation)"
    ends = f", where privacy.budget {settings.budget:g} ends it" if len(spent) < recipe.rounds else ""
    return (
        f"privacy.mode {settings.mode}: epsilon {spent[-1]:.3g} at delta {settings.delta:g} after {len(spent)} of "
        f"{recipe.rounds} rounds{ends}; noise from {source}"
    )


def _opacus() -> ModuleType:
    try:
        from opacus.accountants.analysis import rdp
    except ImportError as problem:
        raise RecipeError(
            f"privacy.mode: the accounting needs a package that is not installed ({problem}); run: pip install "
            "'fedrot[privacy]'"
        ) from None
    return rdp
