"""Metrics to experiment trackers, through accelerate's adapters for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedrot.core.errors import RunError
from fedrot.running.recipe import Recipe, flatten

# tracker -> (package to install, class in accelerate.tracking)
_TRACKERS = {
    "tensorboard": ("tensorboard", "TensorBoardTracker"),
    "wandb": ("wandb", "WandBTracker"),
    "mlflow": ("mlflow", "MLflowTracker"),
    "trackio": ("trackio", "TrackioTracker"),
}


class Trackers:
    """The trackers that a recipe names; none is fine."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._open = [_start(name, recipe, folder) for name in recipe.tracking.to]

    def log(self, record: Mapping[str, Any]) -> None:
        """One round's numbers, under flat names; the numbers of single layers stay in metrics.jsonl."""
        values = {
            key.replace(".", "/"): value
            for key, value in flatten(record).items()
            if isinstance(value, (int, float)) and ".layers." not in key and key != "round"
        }
        for tracker in self._open:
            tracker.log(values, step=record["round"])

    def close(self) -> None:
        """Flush and close all."""
        for tracker in self._open:
            tracker.finish()
        self._open = []


def _start(name: str, recipe: Recipe, folder: Path) -> Any:
    package, class_name = _TRACKERS[name]
    try:
        from accelerate import PartialState, tracking

        PartialState()  # the trackers write on the main process only, and ask this which one it is
        kind = getattr(tracking, class_name)
        if name == "tensorboard":
            tracker = kind(recipe.name, logging_dir=folder / "tensorboard")
        elif name == "mlflow":
            tracker = kind(experiment_name=recipe.tracking.project, run_name=recipe.name)
        else:
            tracker = kind(recipe.tracking.project)
        tracker.start()
        tracker.store_init_configuration({k: v for k, v in flatten(recipe.to_dict()).items() if _plain(v)})
    except (OSError, ValueError, RuntimeError) as problem:
        raise RunError(f"tracking.to: {name} could not be started ({' '.join(str(problem).split())[:200]})") from None
    except ImportError as problem:
        raise RunError(
            f"tracking.to: {name} needs packages that are not installed ({problem}); "
            f"run: pip install 'fedrot[tracking]' {package}"
        ) from None
    return tracker


def _plain(value: object) -> bool:
    return isinstance(value, (int, float, str, bool))
