"""Who takes part in a round."""

import secrets
from collections.abc import Sequence

import torch

from fedrot.core.seeding import generator
from fedrot.running.recipe import Recipe
from fedrot.running.settings import drawn_count


def drawn_for(recipe: Recipe, clients: Sequence[str], round: int) -> list[str]:
    """The clients of a round, sorted. Where privacy counts on nobody knowing who takes part (`by_chance`), each is
    drawn by itself: any number of them, also none.
    """
    share = recipe.federation.participation
    if not by_chance(recipe):
        return draw_clients(clients, share, recipe.seed, round)
    if recipe.privacy.secure:
        system = secrets.SystemRandom()
        return sorted(client for client in clients if system.random() < share)
    chances = torch.rand(len(clients), generator=generator(recipe.seed, round, "draw"), dtype=torch.float64)
    return [client for client, chance in zip(sorted(clients), chances.tolist(), strict=True) if chance < share]


def by_chance(recipe: Recipe) -> bool:
    """Whether every client is drawn by itself: what is known of privacy under sampling holds for such draws."""
    return recipe.privacy.mode == "central" and recipe.federation.participation < 1


def draw_clients(clients: Sequence[str], participation: float, seed: int, round: int) -> list[str]:
    """As many clients in every round, sorted; at least one. Depends on seed, round and the clients' names alone."""
    count = drawn_count(len(clients), participation)
    if count == len(clients):
        return sorted(clients)
    order = torch.randperm(len(clients), generator=generator(seed, round, "draw")).tolist()
    return sorted(sorted(clients)[i] for i in order[:count])
