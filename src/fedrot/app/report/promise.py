"""What a private run promises its clients, in a sentence."""

from fedrot.app.report.load import RunData

_WHO = {
    "central": "of its adapters, for every client; what else is in the run folder, this report too, is for the server",
    "local": "of all that a client sent, for every client",
    "example": "of all that clients sent, for each single training example of theirs",
}


def epsilon(run: RunData) -> float | None:
    """Epsilon after the last round; None without privacy, or without noise."""
    return run.metrics[-1].get("privacy", {}).get("epsilon")


def promise(run: RunData) -> str | None:
    """Epsilon, delta, for whom, and whether the budget ended the run; None for a run without privacy."""
    settings, rounds = run.recipe.privacy, len(run.metrics)
    if settings.mode == "none":
        return None
    spent = epsilon(run)
    if spent is None:
        what = "gradients of examples" if settings.mode == "example" else "changes"
        return f"Nothing is promised: {what} were clipped at {settings.clip:g}, and no noise was added."
    ended = ""
    if run.result.get("privacy", {}).get("stopped"):
        ended = f" The budget, {settings.budget:g}, ended it after {rounds} of {run.recipe.rounds} rounds."
    seed = ""
    if not settings.secure:
        seed = " A simulation: its noise comes from the recipe's seed and hides nothing from whoever has the recipe."
    each = run.metrics[-1]["privacy"].get("by_client", {}).values()
    least = f" (the least of any client: {min(each):.3g})" if each else ""
    return (
        f"Differential privacy, {settings.mode}: epsilon {spent:.3g} at delta {settings.delta:g} after {rounds} rounds "
        f"{_WHO[settings.mode]}{least}.{ended}{seed}"
    )
