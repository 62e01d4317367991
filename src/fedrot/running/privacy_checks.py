"""What a recipe's privacy must be: refused is what would do nothing, or what clip and noise would not cover."""

from typing import TYPE_CHECKING

from fedrot.core.errors import RecipeError

if TYPE_CHECKING:
    from fedrot.running.recipe import Recipe


def check_privacy(r: "Recipe") -> None:
    """Refuse settings without a mode, and what clipping and noise do not make private. Raises `RecipeError`."""
    mode, method = r.privacy.mode, r.method
    if mode == "none":
        for key, usual in (("clip", None), ("noise", None), ("delta", None), ("budget", None), ("secure", False)):
            if getattr(r.privacy, key) != usual:
                leave = "null" if usual is None else "false"
                raise RecipeError(f"privacy.{key}: it is for a privacy.mode; give privacy.mode, or leave it {leave}")
        return
    clients, examples = mode != "example", mode == "example"  # whom it protects
    for key in ("clip", "noise", "delta"):
        if getattr(r.privacy, key) is None:
            raise RecipeError(f"privacy.{key}: give it for privacy.mode {mode}; docs/privacy.md says how it is chosen")
    counts = "counts of private examples" + (
        ", by which one client's change could weigh more than privacy.clip allows" if clients else ""
    )
    if method.weighting not in (None, "uniform"):
        raise RecipeError(f"privacy.mode: method {method.name} weights clients by {counts}; choose another method")
    for refused, key, why in (
        (
            method.weighting is None and r.federation.weighting != "uniform",
            "federation.weighting",
            f"{r.federation.weighting} weights clients by {counts}; set it to uniform",
        ),
        (
            clients and r.local.scaffold,
            "local.scaffold",
            "control variates travel beside the change, and are neither clipped nor noised; set it to false",
        ),
        (
            clients and r.lora.head == "personal",
            "lora.head",
            "heads of the clients' own are learnt without noise and go into the result; set it to shared or frozen",
        ),
        (
            r.evaluation.choose == "best",
            "evaluation.choose",
            "which round scored best depends on examples that no noise protects; set it to last",
        ),
        (
            r.privacy.budget is not None and r.privacy.noise == 0,
            "privacy.budget",
            "without noise epsilon is infinite from the first round; give privacy.noise, or set the budget to null",
        ),
        (
            clients and r.robust.rule != "none",
            "robust.rule",
            "noise is made for a sum of clipped changes, and what a rule makes of them is none; set it to none",
        ),
        (
            mode == "local" and r.checks.max_norm is not None,
            "checks.max_norm",
            "noise is most of an upload's norm, and privacy.clip bounds the rest; set it to null",
        ),
        (
            examples and r.local.clip is not None,
            "local.clip",
            "it would clip the noise: each example's gradient is clipped at privacy.clip before; set it to null",
        ),
        (
            examples and "train" in (r.evaluation.split, r.evaluation.final),
            "evaluation",
            "scores on train are of the very examples that are protected, without noise; choose another split",
        ),
        (
            examples and r.evaluation.shots > 0,
            "evaluation.shots",
            "worked examples are of train, and what is answered after them has no noise; set it to 0",
        ),
    ):
        if refused:
            raise RecipeError(f"{key}: with privacy.mode {mode}, {why}")
