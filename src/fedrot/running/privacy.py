"""Differential privacy in a run: what a client sends, and what the server makes of a round's uploads.

The order at a client: train, turn, clip, add noise (local), compress. At the server (central): clip again, since a
client may not have done it, sum, add noise. Where single examples are protected, noise is in the training itself.
docs/privacy.md says what follows for whom; accounting.py what it costs.
"""

from collections.abc import Iterable
from dataclasses import replace

from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Upload
from fedrot.core.privacy import (
    NoisyMean,
    Normals,
    clipped_change,
    seeded_normals,
    system_normals,
    with_change,
    with_noise,
)
from fedrot.core.reduce import Reduction
from fedrot.core.seeding import generator
from fedrot.learning.private import ExamplePrivacy
from fedrot.running.recipe import Recipe


def guarded(adapter: Adapter, broadcast: Adapter, parts: frozenset[str], recipe: Recipe, *key: int | str) -> Adapter:
    """What a client sends of its adapter: its change clipped and, in local mode, with noise. `key` names the noise."""
    mode, clip = recipe.privacy.mode, recipe.privacy.clip
    if mode not in ("central", "local") or clip is None:
        return adapter
    change = clipped_change(adapter, broadcast, parts, clip)
    if mode == "local":
        change = with_noise(change, _deviation(recipe), _normals(recipe, *key))
    return with_change(broadcast, change)


def of_examples(recipe: Recipe) -> ExamplePrivacy | None:
    """What local steps do for the privacy of single examples; None in other modes."""
    settings = recipe.privacy
    if settings.mode != "example" or settings.clip is None or settings.noise is None:
        return None
    return ExamplePrivacy(settings.clip, settings.noise, settings.secure)


def told(recipe: Recipe) -> tuple[bool, bool]:
    """Whether an upload says, beside its adapter: counts, losses and times; rotations and drift.

    All of them say something of the data, and none has noise. But for rotations and drift where single examples are
    protected: they follow from factors that are private already.
    """
    return recipe.privacy.mode not in ("local", "example"), recipe.privacy.mode != "local"


def counted(recipe: Recipe, splits: Iterable[str]) -> list[str]:
    """Of a site's splits, those whose numbers of examples it says on joining: none where clients are private from the
    server. Where single examples are, that of train, which is the same with and without any one of them: by it the
    server knows what a round costs.
    """
    if recipe.privacy.mode == "local":
        return []
    return [split for split in splits if split == "train" or recipe.privacy.mode != "example"]


def silent(upload: Upload, recipe: Recipe) -> Upload:
    """The upload with nothing but its adapter and what is `told`."""
    reports, turns = told(recipe)
    if not reports:
        upload = replace(upload, held=0, used=0, metrics={}, seconds={})
    return upload if turns else replace(upload, rotation={}, layers={})


def reduction_of(recipe: Recipe, form: Adapter, parts: frozenset[str], round: int, clients: int) -> Reduction:
    """What a round's uploads go into, of all `clients` of the federation: a weighted mean, or one with noise."""
    if recipe.privacy.mode != "central" or recipe.privacy.clip is None:
        return Reduction(form, parts, keep=recipe.method.capabilities.reduction == "factors")
    expected = recipe.federation.participation * clients
    normals = _normals(recipe, recipe.seed, round)
    return NoisyMean(form, parts, recipe.privacy.clip, _deviation(recipe), expected, normals)


def _deviation(recipe: Recipe) -> float:
    return (recipe.privacy.noise or 0.0) * (recipe.privacy.clip or 0.0)


def _normals(recipe: Recipe, *key: int | str) -> Normals:
    return system_normals if recipe.privacy.secure else seeded_normals(generator(*key, "privacy"))
