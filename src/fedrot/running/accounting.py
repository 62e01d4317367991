"""What rounds cost in privacy: epsilon after so many of them, and how many a budget allows.

Epsilon is a function of recipe, clients and number of rounds, so a resumed run needs no memory of it, and a budget is a
number of rounds that is known before the first one. Rényi differential privacy of the Gaussian mechanism, of which each
client's term is there with a known probability (Mironov et al., arXiv 1908.10530), adds up over rounds and gives
epsilon at the recipe's delta (Balle et al., arXiv 1905.09982). Both come from Opacus and are upper bounds.

central   a federation and the same one in which a client never gives anything: its term of the sum, of norm C at most,
          is there or not, so the noise is z times what one client can change.
example   a client's data, and the same data of which one example never gives a gradient: in each of the client's local
          steps its term, of norm C at most, is there or not, by a chance that is known. The number of examples is the
          same in both. A client pays for the steps of the rounds in which it was drawn; the run's epsilon is that of
          the client that pays most.
local     a client's data and any other data: its change may be any other one of norm C at most, 2 C away, so the noise
          is z / 2 times that. The server sees who sent what, so no chance of not being drawn helps; a client pays for
          the rounds in which it was drawn, and epsilon is that of the client drawn most often.
"""

import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

from fedrot.core.errors import RecipeError, RunError
from fedrot.learning.local import step_count
from fedrot.learning.private import expected_batch
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
            raise ValueError("an accountant is for recipes with a privacy.mode")
        self._recipe, self._delta = recipe, settings.delta
        self._noise = settings.noise / 2 if settings.mode == "local" else settings.noise
        self._chance = recipe.federation.participation if by_chance(recipe) else 1.0
        if self._noise:
            _opacus()
        if settings.mode != "example":
            self._within_budget(self.epsilon(1))

    def epsilon(self, times: int, chance: float | None = None) -> float:
        """Epsilon after so many noisy sums that a term was in, or could have been by this chance; None: a client's
        chance to be in a round. Infinite without noise.
        """
        if times == 0:
            return 0.0
        if self._noise == 0:
            return float("inf")
        return _epsilon(self._noise, self._chance if chance is None else chance, times, self._delta)

    def by_round(self, clients: Sequence[str], held: Mapping[str, int] | None = None) -> list[float]:
        """Epsilon after 1, 2, ... rounds, as many as the recipe asks for and the budget allows; of single examples that
        of the client that pays most, by the examples that each of the clients has. Raises `RecipeError` where delta, or
        the expected number of clients in a round, means nothing for so many clients or examples.
        """
        recipe = self._recipe
        if recipe.privacy.mode == "example":
            spent = [max(each.values()) for each in self.by_client(clients, held or {})]
        else:
            self._check_delta(len(clients), "the number of clients")
            if self._chance * len(clients) < 1:
                raise RecipeError(
                    f"federation.participation: of {len(clients)} clients fewer than one would be drawn a round; raise "
                    "it"
                )
            spent = [self.epsilon(times) for times in self._times(clients)]
        budget = recipe.privacy.budget
        return spent if budget is None else spent[: bisect_right(spent, budget)]

    def by_client(self, clients: Sequence[str], held: Mapping[str, int]) -> list[dict[str, float]]:
        """With privacy.mode example every client's own epsilon after 1, 2, ... rounds; none where it is not known yet
        who has how many examples. Raises `RunError` where it is known of some clients only.
        """
        if not held:
            return []
        if missing := sorted(set(clients) - held.keys()):
            raise RunError(
                f"privacy.mode example: what rounds cost depends on a client's number of examples, and {missing[0]!r} "
                "has not joined; begin when all clients are there"
            )
        largest = max(clients, key=lambda client: held[client])
        self._check_delta(held[largest], f"the examples of {largest!r}")
        recipe, drawn = self._recipe, dict.fromkeys(clients, 0)
        found = []
        for number in range(recipe.rounds):
            for client in draw_clients(clients, recipe.federation.participation, recipe.seed, number):
                drawn[client] += 1
            found.append({client: self._of_examples(held[client], times) for client, times in drawn.items()})
        client = max(found[0], key=lambda name: found[0][name])
        self._within_budget(found[0][client], f"{client!r} ")
        return found

    def records(self, clients: Sequence[str], held: Mapping[str, int]) -> list[dict[str, Any]]:
        """What `by_round` gives, as the rounds' records say it; of single examples also by client."""
        plain = [{"epsilon": spent, "delta": self._delta} for spent in self.by_round(clients, held)]
        if self._recipe.privacy.mode != "example":
            return plain
        each = self.by_client(clients, held)
        return [{**record, "by_client": spent} for record, spent in zip(plain, each, strict=False)]

    def _of_examples(self, held: int, rounds: int) -> float:
        """Epsilon of a client of so many examples after rounds that it was drawn for."""
        local = self._recipe.local
        return self.epsilon(rounds * step_count(held, local), expected_batch(held, local.batch) / held)

    def _within_budget(self, first: float, who: str = "") -> None:
        budget = self._recipe.privacy.budget
        if budget is not None and first > budget:
            raise RecipeError(
                f"privacy.budget: one round costs {who}epsilon {first:.3g}, the budget is {budget:g}; raise "
                "privacy.noise or the budget"
            )

    def _check_delta(self, count: int, what: str) -> None:
        if self._delta * count >= 1:
            raise RecipeError(
                f"privacy.delta is {self._delta:g}: from one over {what} on, 1 / {count}, it allows giving one of them "
                "away; set it well below that"
            )

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


@lru_cache(maxsize=1 << 10)
def _renyi(noise: float, chance: float) -> Any:  # (orders,) Rényi differential privacy of one noisy sum
    return _opacus().compute_rdp(q=chance, noise_multiplier=noise, steps=1, orders=_ORDERS)


@lru_cache(maxsize=1 << 18)
def _epsilon(noise: float, chance: float, times: int, delta: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the best order being the last one: a bound it is all the same
        found, _ = _opacus().get_privacy_spent(orders=_ORDERS, rdp=times * _renyi(noise, chance), delta=delta)
    return max(0.0, float(found))


def _opacus() -> ModuleType:
    try:
        from opacus.accountants.analysis import rdp
    except ImportError as problem:
        raise RecipeError(
            f"privacy.mode: the accounting needs a package that is not installed ({problem}); run: pip install "
            "'fedrot[privacy]'"
        ) from None
    return rdp
