"""Epsilon against formulas and integrals of one's own, and what a budget allows."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import go
from scipy import integrate, optimize, stats

from fedrot.core.errors import RecipeError
from fedrot.running.accounting import Accountant, described
from fedrot.running.draws import draw_clients
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe

PRIVATE = ("--federation.weighting", "uniform", "--privacy.clip", "1")
DELTA = 1e-5
MANY = [f"c{i:03d}" for i in range(200)]


@pytest.fixture
def make(tiny_values: dict[str, Any]) -> Any:
    def recipe(noise: float, *flags: str, mode: str = "central", rounds: int = 30, delta: float = DELTA) -> Recipe:
        given = ("--privacy.mode", mode, "--privacy.noise", str(noise), "--privacy.delta", str(delta))
        return parse_recipe(tiny_values, [*PRIVATE, *given, "--rounds", str(rounds), *flags])

    return recipe


def gaussian_epsilon(noise: float, times: int) -> float:
    """The exact epsilon of so many Gaussian mechanisms together (Balle and Wang, arXiv 1805.06530)."""
    mu = math.sqrt(times) / noise

    def delta(epsilon: float) -> float:
        left = stats.norm.cdf(mu / 2 - epsilon / mu)
        return float(left - math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu)))

    return float(optimize.brentq(lambda e: delta(e) - DELTA, 1e-9, 500))


def renyi_epsilon(noise: float, times: int) -> float:
    """The least over all orders of the Gaussian's Rényi divergence, a / (2 z^2), turned into epsilon."""

    def epsilon(a: float) -> float:
        return times * a / (2 * noise**2) + math.log((a - 1) / a) - (math.log(DELTA) + math.log(a)) / (a - 1)

    return float(optimize.minimize_scalar(epsilon, bounds=(1.0001, 5000), method="bounded").fun)


def sampled_renyi(noise: float, chance: float, order: int) -> float:
    """The Rényi divergence of (1 - q) N(0, z^2) + q N(1, z^2) from N(0, z^2), by numerical integration."""

    def moment(x: float) -> float:
        log_ratio = np.logaddexp(math.log1p(-chance), math.log(chance) + (2 * x - 1) / (2 * noise**2))
        return float(np.exp(order * log_ratio + stats.norm.logpdf(x, scale=noise)))

    value, _ = integrate.quad(moment, -30 * noise, 30 * noise + order, limit=500, points=[0.0, float(order)])
    return math.log(value) / (order - 1)


@pytest.mark.parametrize(("noise", "times"), [(1.0, 1), (1.1, 20), (5.0, 100), (0.4, 3), (40.0, 10)])
def test_with_all_clients_it_is_the_gaussian_mechanism_s(make: Any, noise: float, times: int) -> None:
    found = Accountant(make(noise)).epsilon(times)
    best = renyi_epsilon(noise, times)
    assert best <= found * (1 + 1e-6)
    assert found == pytest.approx(best, rel=5e-3)
    exact = gaussian_epsilon(noise, times)
    assert exact <= found <= 1.25 * exact


@pytest.mark.parametrize(("noise", "chance"), [(1.0, 0.1), (2.0, 0.3), (0.8, 0.02)])
def test_with_clients_drawn_by_chance_it_is_the_sampled_mechanism_s(make: Any, noise: float, chance: float) -> None:
    times = 30
    found = Accountant(make(noise, "--federation.participation", str(chance))).epsilon(times)
    epsilons = [
        times * sampled_renyi(noise, chance, a) + math.log((a - 1) / a) - (math.log(DELTA) + math.log(a)) / (a - 1)
        for a in range(2, 24)
    ]
    # Whole orders alone are a little above the best of all orders.
    assert found <= min(epsilons) * (1 + 1e-6)
    assert found == pytest.approx(min(epsilons), rel=0.05)
    assert found < Accountant(make(noise)).epsilon(times)


def test_local_noise_counts_half_since_any_change_may_become_any_other(make: Any) -> None:
    assert Accountant(make(4.0, mode="local")).epsilon(7) == Accountant(make(2.0)).epsilon(7)


def test_epsilon_by_round_grows_and_is_the_whole_run_s_at_its_end(make: Any) -> None:
    accountant = Accountant(make(2.0, rounds=12))
    spent = accountant.by_round(MANY)
    assert len(spent) == 12
    assert spent == sorted(spent)
    assert spent[-1] == accountant.epsilon(12)
    assert accountant.epsilon(0) == 0.0


def test_a_local_client_pays_for_the_rounds_in_which_it_was_drawn(make: Any) -> None:
    recipe = make(4.0, "--federation.participation", "0.25", mode="local", rounds=20)
    clients = MANY[:8]
    accountant = Accountant(recipe)
    times = dict.fromkeys(clients, 0)
    for number, spent in enumerate(accountant.by_round(clients)):
        for client in draw_clients(clients, 0.25, recipe.seed, number):
            times[client] += 1
        assert spent == accountant.epsilon(max(times.values()))
    assert 5 <= max(times.values()) < 20


def test_a_budget_is_the_most_rounds_that_it_allows(make: Any) -> None:
    free = Accountant(make(3.0)).by_round(MANY)
    for rounds in (1, 7, 29):
        budget = (free[rounds - 1] + free[rounds]) / 2
        spent = Accountant(make(3.0, "--privacy.budget", str(budget))).by_round(MANY)
        assert spent == free[:rounds]
    at_it = Accountant(make(3.0, "--privacy.budget", repr(free[6]))).by_round(MANY)
    assert at_it == free[:7]
    assert Accountant(make(3.0, "--privacy.budget", "1e6")).by_round(MANY) == free


def test_without_noise_it_is_infinite_and_needs_no_library(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    assert Accountant(make(0.0, rounds=2)).by_round(MANY) == [math.inf, math.inf]


def test_very_little_noise_is_a_large_number_and_very_much_a_small_one(make: Any) -> None:
    for mode in ("central", "local"):  # at the ends of what noise may be
        assert 1e7 < Accountant(make(1e-3, mode=mode)).epsilon(30) < math.inf
        assert 0 <= Accountant(make(1e6, mode=mode)).epsilon(30) < 0.01


def message(found: pytest.ExceptionInfo[RecipeError]) -> str:
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_budget_below_one_round_is_refused(make: Any) -> None:
    with pytest.raises(RecipeError) as found:
        Accountant(make(0.5, "--privacy.budget", "1"))
    assert "privacy.budget: one round costs epsilon" in message(found)


def test_a_delta_that_allows_giving_a_client_away_is_refused(make: Any) -> None:
    with pytest.raises(RecipeError) as found:
        Accountant(make(1.0, delta=0.005)).by_round(MANY)
    assert "privacy.delta is 0.005" in message(found)
    assert Accountant(make(1.0, delta=0.0049)).by_round(MANY)


def test_rounds_without_anybody_are_refused(make: Any) -> None:
    with pytest.raises(RecipeError) as found:
        Accountant(make(1.0, "--federation.participation", "0.001")).by_round(MANY)
    assert "federation.participation" in message(found)


def test_a_missing_library_is_named_before_anything_is_loaded(
    tiny_values: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    values = {**tiny_values, "model": {"path": str(tmp_path / "no-such-model")}}
    flags = (*PRIVATE, "--privacy.mode", "central", "--privacy.noise", "1", "--privacy.delta", "1e-5")
    with pytest.raises(RecipeError) as found:
        go(values, tmp_path / "run", *flags)
    assert "pip install 'fedrot[privacy]'" in message(found)
    assert not (tmp_path / "run").exists()


def test_the_log_s_line_says_what_is_promised_and_when_it_ends(make: Any) -> None:
    recipe = make(3.0, "--privacy.budget", "8", rounds=30)
    spent = Accountant(recipe).by_round(MANY)
    assert 1 < len(spent) < 30
    line = described(recipe, spent)
    assert f"epsilon {spent[-1]:.3g} at delta 1e-05 after {len(spent)} of 30 rounds" in line
    assert "privacy.budget 8 ends it" in line
    assert "a simulation" in line
    assert "simulation" not in described(make(3.0, "--privacy.secure", "true", rounds=len(spent)), spent)


def test_the_table_of_the_documentation_is_what_the_accounting_says(make: Any) -> None:
    whole_page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    text = whole_page.partition("## What it costs")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) == 5
    for row in rows:
        noise, *cells = (float(cell) for cell in row)
        tenth = Accountant(make(noise, "--federation.participation", "0.1"))
        whole, local = Accountant(make(noise)), Accountant(make(noise, mode="local"))
        found = [whole.epsilon(10), whole.epsilon(30), tenth.epsilon(30), tenth.epsilon(100), local.epsilon(10)]
        assert cells == [round(epsilon, 2) for epsilon in found]
