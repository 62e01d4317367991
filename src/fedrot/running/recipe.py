"""The recipe: everything a run depends on, typed, checked, read from YAML or JSON and written back resolved.

The keys of a recipe, the flags of `fedrot run` and its help all come from the settings records of the floors and of
the method; nothing is declared twice.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fedrot.core.errors import RecipeError
from fedrot.core.methods import Method, get_method
from fedrot.core.methods.rotation import FedRot
from fedrot.core.settings import CheckSettings, DiagnosticsSettings, RobustSettings, ServerSettings
from fedrot.learning.settings import (
    ComputeSettings,
    DataSettings,
    EvaluationSettings,
    LocalSettings,
    LoraSettings,
    ModelSettings,
    PartitionSettings,
)
from fedrot.running.recipe_checks import check_combinations, ranges
from fedrot.running.settings import (
    CheckpointSettings,
    FederationSettings,
    PrivacySettings,
    SecureSettings,
    TrackingSettings,
)


@dataclass(frozen=True)
class Recipe:
    """A federated fine-tuning run. A run is a function of its recipe and the data."""

    name: str = "run"
    """Name of the run; its folder is runs/NAME unless --out says otherwise."""
    seed: int = 0
    """Seed of every random choice."""
    rounds: int = 10
    """Number of rounds. They are counted from 0, as in the paper."""
    init: str | None = None
    """Folder of a PEFT adapter to start from; null starts afresh from the seed."""
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataSettings = field(default_factory=DataSettings)
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    local: LocalSettings = field(default_factory=LocalSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    method: Method = field(default_factory=FedRot)
    server: ServerSettings = field(default_factory=ServerSettings)
    checks: CheckSettings = field(default_factory=CheckSettings)
    robust: RobustSettings = field(default_factory=RobustSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    secure: SecureSettings = field(default_factory=SecureSettings)
    diagnostics: DiagnosticsSettings = field(default_factory=DiagnosticsSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    def __post_init__(self) -> None:
        for key, good, must in ranges(self):
            if not good:
                raise RecipeError(f"{key} must be {must}, got {value_at(self.to_dict(), key)!r}")
        check_combinations(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them; `from_values` is the inverse."""
        plain = asdict(self)
        plain["method"] = {"name": self.method.name, **self.method.settings()}
        return plain

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Recipe":
        """From nested values of the right types; `recipe_file.parse_recipe` takes unchecked ones."""
        known = {f.name: f for f in fields(cls)}
        made: dict[str, Any] = {}
        for key, value in values.items():
            if key == "method":
                settings = dict(value)
                made[key] = get_method(settings.pop("name", FedRot.name))(**settings)
            elif key in SECTIONS:
                made[key] = SECTIONS[key](**{k: _named(v) for k, v in value.items()})
            elif key in known:
                made[key] = value
            else:
                raise RecipeError(f"{key}: there is no such recipe key")
        return cls(**made)


SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "data": DataSettings,
    "partition": PartitionSettings,
    "local": LocalSettings,
    "compute": ComputeSettings,
    "federation": FederationSettings,
    "server": ServerSettings,
    "checks": CheckSettings,
    "robust": RobustSettings,
    "privacy": PrivacySettings,
    "secure": SecureSettings,
    "diagnostics": DiagnosticsSettings,
    "evaluation": EvaluationSettings,
    "checkpoint": CheckpointSettings,
    "tracking": TrackingSettings,
}


def _named(value: Any) -> Any:
    """A mapping of clients with their names as text: YAML takes a name of digits for a number."""
    return {str(name): inner for name, inner in value.items()} if isinstance(value, Mapping) else value


def value_at(plain: Mapping[str, Any], key: str) -> Any:
    """plain['a']['b'] for key 'a.b'; None where there is none."""
    value: Any = plain
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
