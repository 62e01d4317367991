"""A run folder: what is in it, and who may write to it.

recipe.yaml      the resolved recipe           adapter/      the result, in PEFT format
versions.json    software, machine, data       clients/      one adapter a client, where heads are personal
partition.json   who held which example        result.json   the last scores
metrics.jsonl    a line a round                report.html   figures/   what people look at
checkpoints/     the last rounds
"""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from fedrot.core.errors import RunError
from fedrot.core.files import remove_partial, write_atomic
from fedrot.running.choices import adopted
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import changed_key, to_yaml


class RunFolder:
    """The folder of one run. Opening it to write takes a lock that ends with the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the rounds are kept."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Where the result goes."""
        return self.path / "adapter"

    def create(self, recipe: Recipe) -> None:
        """Start a new run here. Raises `RunError` where there is one already."""
        self.refuse_existing()
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self.write("recipe.yaml", to_yaml(recipe))

    def refuse_existing(self) -> None:
        """Raise `RunError` where something is that a new run would overwrite."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: this is a file; choose a folder by --out")
        if (self.path / "recipe.yaml").exists():
            raise RunError(
                f"{self.path}: a run is there already; go on with --resume, or choose another folder by --out"
            )
        for name in ("checkpoints", "metrics.jsonl", "adapter", "versions.json"):
            if (self.path / name).exists():
                raise RunError(
                    f"{self.path / name}: is there already, without a recipe.yaml; choose another folder by --out"
                )

    def reopen(self, recipe: Recipe) -> Recipe:
        """Go on with the run here; `recipe` must be the one it was started with. Gives the resolved recipe."""
        resolved = self.recipe()
        self._take_lock()
        # What was chosen when the run began is used again, so that arithmetic stays the same.
        if change := changed_key(resolved.to_dict(), adopted(recipe, resolved).to_dict()):
            key, old, now = change
            raise RunError(
                f"{self.path}: the run was started with {key} {old!r}, the recipe now has {now!r}; resume with the "
                "recipe as it was, or start another run by --out"
            )
        return resolved

    def recipe(self) -> Recipe:
        """The resolved recipe of the run here; `RunError` where there is none."""
        path = self.path / "recipe.yaml"
        if not self.path.is_dir():
            raise RunError(f"{self.path}: no such run folder")
        try:
            return Recipe.from_values(yaml.safe_load(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RunError(f"{self.path}: not a run folder, it has no recipe.yaml") from None
        except (yaml.YAMLError, ValueError, TypeError, AttributeError) as problem:
            raise RunError(f"{path}: not a resolved recipe ({' '.join(str(problem).split())})") from None

    def write(self, name: str, content: str) -> None:
        """Write a text file here in one step."""
        write_atomic(self.path / name, content.encode())

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file here in one step."""
        self.write(name, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """A JSON file of the run; None where it has not been written yet."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise RunError(f"{path}: not valid JSON ({problem})") from None

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, on disk when this returns."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """Every complete line of metrics.jsonl; a last line cut by a kill is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except UnicodeDecodeError as problem:
            raise RunError(f"{path}: not a text file ({problem}); it is damaged") from None
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            if number == len(lines) and not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                if record["round"] != len(records):
                    raise ValueError("not the round that is next")
            except (ValueError, TypeError, KeyError):
                raise RunError(
                    f"{path}: line {number} is not that of round {len(records)}; the file is damaged"
                ) from None
            records.append(record)
        return records

    def forget_metrics_from(self, rounds: int) -> None:
        """Drop the lines of rounds that are not in the checkpoint: they will be run again."""
        kept = self.metrics()[:rounds]
        if len(kept) < rounds:
            raise RunError(
                f"{self.path / 'metrics.jsonl'}: holds {len(kept)} of the {rounds} finished rounds; it is damaged"
            )
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def _take_lock(self) -> None:
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{self.path}: another process is running this run; wait for it or end it") from None
        remove_partial(self.path)

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def finite(value: Any) -> Any:
    """The same plain value with NaN and infinities as null, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
