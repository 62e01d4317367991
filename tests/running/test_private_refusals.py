"""What cannot be sound with privacy is refused when the recipe is read, with the reason."""

from typing import Any

import pytest

from fedrot.core.errors import RecipeError
from fedrot.core.methods import methods
from fedrot.running.recipe_file import parse_recipe

PRIVATE = [name for name, m in methods().items() if m.capabilities.private and m.weighting is None]


def with_privacy(mode: str, noise: float) -> list[str]:
    flags = ["--federation.weighting", "uniform", "--privacy.delta", "1e-5", "--privacy.clip", "0.5"]
    return [*flags, "--privacy.mode", mode, "--privacy.noise", str(noise)]


@pytest.mark.parametrize("mode", ["central", "local"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--federation.weighting", "held"), ("federation.weighting", "private examples", "uniform")),
        (("--federation.weighting", "used"), ("federation.weighting", "private examples")),
        (("--local.scaffold", "true"), ("local.scaffold", "control variates")),
        (("--lora.head", "personal"), ("lora.head", "shared or frozen")),
        (("--evaluation.choose", "best"), ("evaluation.choose", "last")),
        (("--privacy.noise", "0", "--privacy.budget", "3"), ("privacy.budget", "infinite")),
        (("--robust.rule", "norm"), ("robust.rule", "none")),
        (("--privacy.clip", "null"), ("privacy.clip", "give it")),
        (("--privacy.noise", "null"), ("privacy.noise", "give it")),
        (("--privacy.delta", "null"), ("privacy.delta", "give it")),
        (("--privacy.clip", "0"), ("privacy.clip", "positive")),
        (("--privacy.noise", "-1"), ("privacy.noise", "from 1e-3 to 1e6")),
        (("--privacy.noise", "1e-200"), ("privacy.noise", "from 1e-3 to 1e6")),
        (("--privacy.noise", "1e200"), ("privacy.noise", "from 1e-3 to 1e6")),
        (("--privacy.delta", "1"), ("privacy.delta", "between 0 and 1")),
        (("--privacy.budget", "0"), ("privacy.budget", "positive")),
        (("--method.name", "as_published"), ("privacy.mode", "as_published", "private examples")),
    ],
)
def test_what_would_not_be_private_is_refused(
    mode: str, flags: tuple[str, ...], words: tuple[str, ...], tiny_values: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as found:
        parse_recipe(tiny_values, [*with_privacy(mode, 1.0), *flags])
    assert "\n" not in str(found.value)
    assert all(word in str(found.value) for word in words), str(found.value)


@pytest.mark.parametrize(
    ("key", "value", "usual"),
    [
        ("clip", "1", "null"),
        ("noise", "4", "null"),
        ("noise", "0", "null"),
        ("delta", "1e-5", "null"),
        ("budget", "0.001", "null"),
        ("secure", "true", "false"),
    ],
)
def test_settings_without_a_mode_are_refused(key: str, value: str, usual: str, tiny_values: dict[str, Any]) -> None:
    words = rf"privacy\.{key}: it is for a privacy\.mode; give privacy\.mode, or leave it {usual}$"
    with pytest.raises(RecipeError, match=words):
        parse_recipe(tiny_values, [f"--privacy.{key}", value])
    assert parse_recipe(tiny_values, [f"--privacy.{key}", usual]).privacy.mode == "none"


def test_a_norm_bound_is_refused_where_noise_is_in_the_norm(tiny_values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"checks\.max_norm.*local"):
        parse_recipe(tiny_values, [*with_privacy("local", 1.0), "--checks.max_norm", "1"])
    assert parse_recipe(tiny_values, [*with_privacy("central", 1.0), "--checks.max_norm", "1"])


@pytest.mark.parametrize("name", [name for name in methods() if name not in PRIVATE and name != "as_published"])
def test_methods_that_see_more_than_a_sum_are_refused_by_name(name: str, tiny_values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"privacy\.mode: method {name} .*methods that work: .*fedrot"):
        parse_recipe(tiny_values, [*with_privacy("central", 1.0), "--method.name", name])


@pytest.mark.parametrize("mode", ["central", "local"])
@pytest.mark.parametrize("name", PRIVATE)
def test_the_others_and_what_goes_with_them_are_taken(name: str, mode: str, tiny_values: dict[str, Any]) -> None:
    more = ["--server.optimizer", "adam", "--local.prox", "0.1", "--federation.compression", "int8"]
    recipe = parse_recipe(tiny_values, [*with_privacy(mode, 1.0), "--method.name", name, *more])
    assert recipe.privacy.mode == mode
