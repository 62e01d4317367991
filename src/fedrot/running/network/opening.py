"""A run between sites, from a recipe: what its server has, and what it can promise without seeing any data."""

import secrets
from collections.abc import Callable, Sequence

from fedrot.core.errors import RecipeError, RunError
from fedrot.learning.loading import load_model
from fedrot.learning.sources.read import known_labels
from fedrot.running.choices import for_machine
from fedrot.running.clock import check_clients, check_real
from fedrot.running.folder import RunFolder
from fedrot.running.network.buffered import Buffered
from fedrot.running.network.engine import Expected, Network, Post
from fedrot.running.network.journal import FileJournal
from fedrot.running.network.secure import require
from fedrot.running.prepare import check_length, first_adapter
from fedrot.running.privacy import told
from fedrot.running.recipe import Recipe
from fedrot.running.run import Stage
from fedrot.running.settings import drawn_count

SITES = "sites.json"  # in the run folder: the run's name at its sites, and its clients


def check_asked(recipe: Recipe, where: str) -> None:
    """Refuse what no run can do whose clients are asked by messages, with the reason. Raises `RecipeError`."""
    method = recipe.method
    check_real(recipe)
    for refused, key, why in (
        (method.capabilities.pooled, "method.name", f"{method.name} has one client that holds everything"),
        (
            recipe.evaluation.answers != "none",
            "evaluation.answers",
            "sites are not asked for what their models write; set it to none, and score the adapter by fedrot eval",
        ),
        (
            recipe.evaluation.choose == "best" and (recipe.lora.head == "personal" or method.capabilities.personal),
            "evaluation.choose",
            "sites have their own models of the last round alone; set it to last",
        ),
        (
            not told(recipe)[0] and bool(recipe.evaluation.scored),
            "evaluation.every",
            "scores of the sites' own examples have no noise, which privacy.mode would be undone by; set it to 0 and "
            "evaluation.final to null, and score the adapter by fedrot eval on examples that are yours",
        ),
    ):
        if refused:
            raise RecipeError(f"{key}: {where}, {why}")


def check_for_sites(recipe: Recipe, clients: Sequence[str]) -> None:
    """Refuse what a run between sites cannot do, with the reason. Raises `RecipeError`."""
    check_asked(recipe, "between sites")
    if known_labels(recipe.data) is None:
        raise RecipeError("data.labels: a server sees no examples; give the labels' names in their order")
    for refused, key, why in (
        (
            recipe.privacy.mode != "none" and not recipe.privacy.secure,
            "privacy.secure",
            "whoever has the recipe could take the noise off; set it to true",
        ),
        (
            recipe.data.made_up,
            "data.generated",
            "sites have examples of their own; leave it null",
        ),
        (
            recipe.federation.buffer is not None and recipe.evaluation.choose == "best",
            "evaluation.choose",
            "with federation.buffer, every round is scored by the sites that do not train just then; set it to last",
        ),
    ):
        if refused:
            raise RecipeError(f"{key}: between sites, {why}")
    if recipe.secure.aggregation:
        require()
        if (drawn := drawn_count(len(clients), recipe.federation.participation)) < recipe.secure.fewest:
            raise RecipeError(
                f"secure.fewest: {drawn} of the {len(clients)} clients are drawn for a round, and no sum of fewer than "
                f"{recipe.secure.fewest} is opened; ask more clients"
            )
    check_clients(recipe, clients)
    if strange := sorted(set(recipe.lora.ranks or ()) - set(clients)):
        raise RecipeError(f"lora.ranks: there is no client {strange[0]!r}; the clients are {', '.join(clients[:8])}")


def between_sites(post: Post, clients: Sequence[str], wait: float) -> Callable[[Recipe, RunFolder], Stage]:
    """For `run`: the clients of these names are asked over `post`, and given `wait` seconds to be there at first."""

    def open_stage(recipe: Recipe, folder: RunFolder) -> Stage:
        check_for_sites(recipe, clients)
        described = folder.read_json(SITES) or {"run": secrets.token_hex(8), "clients": sorted(clients)}
        if described["clients"] != sorted(clients):
            was = ", ".join(described["clients"])
            raise RunError(f"{folder.path}: the run was started with the clients {was}; a run's clients stay the same")
        recipe = for_machine(recipe)
        labels = known_labels(recipe.data) or ()
        model = load_model(recipe.model, recipe.lora, labels, recipe.seed)
        check_length(recipe, model)
        expected = Expected(first_adapter(recipe, model), model.fingerprint(), labels)
        kind = Network if recipe.federation.buffer is None else Buffered
        engine = kind(recipe, expected, post, clients, described["run"], FileJournal(folder.path), wait)
        how = f"{len(clients)} sites, each computing as it was told there"
        return Stage(recipe, engine, model, {"model": expected.model}, {SITES: described}, how)

    return open_stage
