"""From a recipe to what a run works on: examples, partition, model, encoded splits."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from fedrot.core.adapter import Adapter
from fedrot.core.errors import DataError, RecipeError, choices
from fedrot.learning.data import Dataset, Rows
from fedrot.learning.encoding import Encoded
from fedrot.learning.generation import prompt_room
from fedrot.learning.loading import load_model
from fedrot.learning.models import ResidentModel
from fedrot.learning.partition import Partition, divide
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.read import read_dataset
from fedrot.learning.strata import by_label
from fedrot.learning.tasks import classification, generation
from fedrot.learning.tasks.answers import Problems
from fedrot.learning.tasks.shots import drawn_shots
from fedrot.running.choices import for_machine, for_model
from fedrot.running.clock import check_clients
from fedrot.running.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """Everything loaded, encoded and divided; the recipe with nothing left open."""

    recipe: Recipe
    dataset: Dataset
    partition: Partition
    model: ResidentModel
    encoded: dict[str, Encoded]

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed: base model and data, by hash."""
        return {
            "model": self.model.fingerprint(),
            "data": {split: data.fingerprint() for split, data in self.encoded.items()},
        }


def divided(recipe: Recipe) -> tuple[Dataset, Partition]:
    """The examples and who gets which. `DataError` where an evaluation split is missing, `RecipeError` for a rank or a
    speed of a client that there is not.
    """
    dataset = read_dataset(recipe.data, recipe.seed)
    for key, split in recipe.evaluation.scored.items():
        if split not in dataset.splits:
            raise DataError(f"evaluation.{key}: the data has no split {split!r}; choose {choices(dataset.splits)}")
    partition = divide(dataset, recipe.partition, recipe.seed, recipe.model)
    check_clients(recipe, partition.clients)
    if strange := sorted(set(recipe.lora.ranks or ()) - set(partition.clients)):
        some = f"the clients are {choices(partition.clients[:8])}" + (" and more" if len(partition.clients) > 8 else "")
        raise RecipeError(f"lora.ranks: there is no client {strange[0]!r}; {some}")
    return dataset, partition


def prepare(recipe: Recipe) -> Prepared:
    """Read and divide the data, load the model, encode the splits that are used, choose what the recipe leaves open."""
    recipe = for_machine(recipe)
    return _loaded(recipe, *divided(recipe))


def prepare_site(recipe: Recipe, name: str) -> Prepared:
    """The same for a site whose data is all one client's, whatever the recipe's partition is."""
    recipe = for_machine(recipe)
    dataset = read_dataset(recipe.data, recipe.seed)
    everything = {split: {name: np.arange(len(rows))} for split, rows in dataset.splits.items()}
    return _loaded(recipe, dataset, Partition((name,), everything, by_label(dataset)))


def _loaded(recipe: Recipe, dataset: Dataset, partition: Partition) -> Prepared:
    if recipe.evaluation.answers != "none":  # what cannot be asked is refused before anything slow is done
        if dataset.labels:
            raise RecipeError("evaluation.answers: these examples have labels and no answers to write; set it to none")
        problems(recipe, dataset, recipe.evaluation.final or recipe.evaluation.split)
    model = load_model(recipe.model, recipe.lora, dataset.labels, recipe.seed)
    if recipe.compute.device == "cuda":
        model.to(torch.device("cuda", 0))
    check_length(recipe, model)
    if recipe.evaluation.answers != "none":
        prompt_room(model, recipe.evaluation.tokens)
    wanted = {"train", *recipe.evaluation.scored.values()}
    encoded = {
        split: _encoded(recipe.data, model, rows, split).mapped()
        for split, rows in dataset.splits.items()
        if split in wanted
    }
    recipe = for_model(recipe, model, encoded["train"], partition)
    torch.set_num_threads(recipe.compute.threads or 1)
    return Prepared(recipe, dataset, partition, model, encoded)


def check_length(recipe: Recipe, model: ResidentModel) -> None:
    """Raise `DataError` where examples may be cut to more tokens than the model has positions for."""
    longest = model.longest()
    if longest is not None and recipe.data.max_length > longest:
        raise DataError(f"data.max_length is {recipe.data.max_length}, {recipe.model.path} has {longest} positions")


def _encoded(settings: DataSettings, model: ResidentModel, rows: Rows, split: str) -> Encoded:
    """A split as the model takes it in."""
    if rows.turns is None:
        return classification.encode(model.tokenizer, rows, settings.max_length, f"the split {split!r}")
    return generation.encode(model.tokenizer, rows, settings.max_length, settings.form)


def problems(recipe: Recipe, dataset: Dataset, split: str) -> Problems:
    """What the recipe asks of a split's conversations. `DataError` where it wants more worked examples than there are,
    or where an answer could not be told from what follows it.
    """
    settings = recipe.evaluation
    shots = drawn_shots(dataset.split("train"), settings.shots, recipe.seed)
    return Problems(dataset.split(split), settings.answers, settings.tokens, recipe.data.form, shots)


def first_adapter(recipe: Recipe, model: ResidentModel) -> Adapter:
    """The adapter of round 0: fresh from the seed, or the one that `init` names."""
    if recipe.init is None:
        return model.read()
    return model.fit(Adapter.load(recipe.init), where=recipe.init)


def versions() -> dict[str, str]:
    """The software that a run depends on, and the machine's kind."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine()}
    for package in ("fedrot", "torch", "transformers", "peft", "datasets", "numpy", "safetensors", "opacus"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"threads": str(torch.get_num_threads())}
