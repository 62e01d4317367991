"""Made-up examples of a task's form, to try a recipe where its data is not at hand. They say nothing of the task."""

import itertools
import logging
import random
from collections.abc import Callable, Sequence

from fedrot.core.seeding import seed_of
from fedrot.learning.data import ASSISTANT, Dataset, Rows, conversations, hold_out
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources import codesearchnet, glue, trec

_GOOD = ("bright", "charming", "clever", "fine", "good", "great", "happy", "lovely", "superb", "warm")
_BAD = ("awful", "bad", "bleak", "boring", "clumsy", "cold", "dull", "poor", "sad", "weak")
_THINGS = ("book", "camera", "concert", "film", "garden", "meal", "play", "poem", "song", "story")
_NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jun")


def read(settings: DataSettings) -> Dataset:
    """`data.generated` training examples, a quarter as many for test, and validation held out as of real data."""
    count = settings.generated or 0
    logging.getLogger("fedrot").warning(
        "no data.path is given: %d made-up examples of the form of %s are used", count, settings.name or settings.source
    )
    train, test = (_rows(settings, split, size) for split, size in (("train", count), ("test", max(8, count // 4))))
    kept, validation = hold_out(train, settings.holdout)
    splits = {"train": kept, "validation": validation, "test": test}
    if settings.source == "glue" and settings.name == "mnli":
        splits["test_mismatched"] = _rows(settings, "test_mismatched", max(8, count // 4))
    return Dataset(splits, _labels(settings))


def _labels(settings: DataSettings) -> tuple[str, ...]:
    """The task's labels; none where text is written."""
    if settings.source == "trec":
        return trec.LABELS
    return glue.labels(settings) if settings.source == "glue" else ()


def _rows(settings: DataSettings, split: str, count: int) -> Rows:
    rng = random.Random(seed_of("generated", settings.name or settings.source, split))
    if settings.source == "gsm8k":
        return conversations([_sum(rng) for _ in range(count)])
    if settings.source == "codesearchnet":
        languages = itertools.islice(itertools.cycle(_FUNCTIONS), count)
        return codesearchnet.rows([_function(rng, language) for language in languages], "made up")
    labels = range(len(_labels(settings)))
    if settings.source == "trec":
        asked = [rng.choice(labels) for _ in range(count)]
        return Rows([_ASKS[label](rng.choice(_NAMES), rng.choice(_THINGS)) for label in asked], asked)
    made = [(_PAIRS[settings.name or ""](rng, label), label) for label in (rng.choice(labels) for _ in range(count))]
    pairs = [pair for (_, pair), _ in made]
    return Rows(
        [text for (text, _), _ in made], [label for _, label in made], None if settings.name == "sst2" else pairs
    )


def _sum(rng: random.Random) -> Sequence[tuple[str, str]]:
    name, thing, a, b = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(2, 60), rng.randint(2, 60)
    question = f"Question: {name} has {a} {thing}s and buys {b} more. How many {thing}s does {name} have?\nAnswer:"
    return ("user", question), (
        ASSISTANT,
        f" {name} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}s.\n#### {a + b}",
    )


def _function(rng: random.Random, language: str) -> codesearchnet.Function:
    sign, verb = rng.choice(list(_VERBS.items()))
    thing, number = rng.choice(_THINGS), rng.randint(2, 60)
    code = _FUNCTIONS[language].format(verb=verb, thing=thing, title=thing.title(), sign=sign, number=number)
    return language, f"{verb.title()} the {thing} by {number}.", code


def _opinion(rng: random.Random, label: int) -> tuple[str, str]:
    words = _GOOD if label else _BAD
    return f"{rng.choice(_NAMES)} says the {rng.choice(_THINGS)} is {rng.choice(words)} and {rng.choice(words)}", ""


def _entailed(rng: random.Random, label: int) -> tuple[str, str]:
    """The second follows from the first for label 0; neither follows for 1; label 2 contradicts it."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    word = rng.choice(_GOOD)
    other = {0: word, 1: rng.choice([w for w in _GOOD if w != word]), 2: rng.choice(_BAD)}[label]
    return f"{name} finds the {thing} {word} and came early", f"the {thing} is {other}"


def _asked(rng: random.Random, label: int) -> tuple[str, str]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    whose = name if label == 0 else rng.choice([n for n in _NAMES if n != name])
    return f"Where is the {thing} of {name}?", f"The {thing} of {whose} is in the {rng.choice(_THINGS)} shop."


def _asked_twice(rng: random.Random, label: int) -> tuple[str, str]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    other = thing if label else rng.choice([t for t in _THINGS if t != thing])
    return f"What did {name} think of the {thing}?", f"How did {name} like the {other}?"


_PAIRS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
    "sst2": _opinion,
    "qnli": _asked,
    "qqp": _asked_twice,
    "rte": _entailed,
    "mnli": _entailed,
}

_VERBS = {"+": "raise", "-": "lower", "*": "multiply", "/": "divide"}
# A function of each of CodeSearchNet's languages.
_FUNCTIONS = {
    "go": "func {verb}{title}({thing} int) int {{\n\treturn {thing} {sign} {number}\n}}",
    "java": "int {verb}{title}(int {thing}) {{\n    return {thing} {sign} {number};\n}}",
    "javascript": "function {verb}{title}({thing}) {{\n  return {thing} {sign} {number};\n}}",
    "php": "function {verb}{title}(${thing}) {{\n    return ${thing} {sign} {number};\n}}",
    "python": "def {verb}_{thing}({thing}):\n    return {thing} {sign} {number}",
    "ruby": "def {verb}_{thing}({thing})\n  {thing} {sign} {number}\nend",
}

# TREC's labels in their order, and a question that asks for each.
_ASKS: tuple[Callable[[str, str], str], ...] = (
    lambda name, thing: f"Why did {name} like the {thing} ?",
    lambda name, thing: f"What kind of {thing} does {name} own ?",
    lambda name, thing: f"What does {name[0]}{thing[0].upper()} stand for in {name} 's {thing} ?",
    lambda name, thing: f"Who gave {name} the {thing} ?",
    lambda name, thing: f"Where did {name} leave the {thing} ?",
    lambda name, thing: f"How many times did {name} see the {thing} ?",
)
