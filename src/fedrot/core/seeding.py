"""Randomness as an argument: every random choice has a name, and the name is its seed."""

import hashlib
import json

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key`, e.g. `seed_of(recipe.seed, "shuffle", round, client)`."""
    text = json.dumps(key)  # tells 1 from "1", and no part can pass for two
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_of(*key)`: the same key gives the same stream, whoever asks and in what order."""
    return torch.Generator().manual_seed(seed_of(*key))
