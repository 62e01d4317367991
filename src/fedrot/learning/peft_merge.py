"""PEFT's own combinations of LoRA adapters (`add_weighted_adapter`), as baselines beside the methods here."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedrot.core.adapter import Adapter
from fedrot.core.aggregate import alike
from fedrot.core.errors import FedrotError, choices
from fedrot.core.products import refill
from fedrot.core.ranks import Frames, pad
from fedrot.core.reduce import Reduction, as_float32
from fedrot.core.seeding import seed_of

# What they are called here -> PEFT's combination_type.
COMBINATIONS: Mapping[str, str] = {
    "peft_linear": "linear",
    "peft_svd": "svd",
    "peft_ties": "ties",
    "peft_dare_linear": "dare_linear",
    "peft_dare_ties": "dare_ties",
}
_SPARSE = ("ties", "dare")


def peft_combination(
    adapters: Sequence[Adapter], weights: Sequence[float], name: str, density: float = 0.5, seed: int = 0
) -> Adapter:
    """The combination of the adapters by PEFT, weights summing to one; the head is the weighted mean.

    PEFT works on a skeleton that has the adapters' layers and no base weights: none of these looks at them. `density`
    is the share of values that TIES and DARE keep. Raises `FedrotError` for an unknown combination, a density outside
    (0, 1], or adapters of other layers.
    """
    if name not in COMBINATIONS:
        raise FedrotError(f"there is no combination {name!r}; choose {choices(COMBINATIONS)}")
    if not 0 < density <= 1:
        raise FedrotError(f"density must be in (0, 1], got {density!r}")
    parts = _one_rank([as_float32(adapter) for adapter in alike(adapters)])
    mean = Reduction(parts[0], frozenset({"a", "b", "head"}))
    for adapter, weight in zip(parts, weights, strict=True):
        mean.add(adapter, weight)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a base model that has no configuration
        torch.manual_seed(seed_of("peft_combination", seed))
        model = _skeleton(parts)
        kind = COMBINATIONS[name]
        more: dict[str, Any] = {"density": density} if kind.startswith(_SPARSE) else {}
        share = [weight / sum(weights) for weight in weights]
        names = [f"part{i}" for i in range(len(parts))]
        model.base_model.add_weighted_adapter(names, share, "merged", combination_type=kind, **more)
    found = {}
    for layer in parts[0].layers:
        module: Any = model.base_model.model.get_submodule(layer)
        scale = module.scaling["merged"]
        found[layer] = (module.lora_B["merged"].weight.detach() * scale, module.lora_A["merged"].weight.detach())
    return refill(mean.result().mean, found)


def _one_rank(adapters: Sequence[Adapter]) -> list[Adapter]:
    """All layers at the largest rank, which PEFT's combinations ask for, at scale 1."""
    rank = max(pair.rank for pair in adapters[0].layers.values())
    form = {}
    frames: Frames = {name: torch.eye(rank, dtype=torch.float64)[: p.rank] for name, p in adapters[0].layers.items()}
    for name, pair in adapters[0].layers.items():
        a, b = pair.a.new_zeros(rank, pair.a.shape[1]), pair.b.new_zeros(pair.b.shape[0], rank)
        form[name] = replace(pair, a=a, b=b)
    return [pad(adapter, frames, Adapter(form)) for adapter in adapters]


def _skeleton(adapters: Sequence[Adapter]) -> Any:
    """A PEFT model whose layers are those of the adapters, each adapter loaded as part0, part1, ..."""
    from peft import LoraConfig, get_peft_model

    root = nn.Module()
    for name, pair in adapters[0].layers.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        linear = nn.Linear(pair.a.shape[1], pair.b.shape[0], bias=False, device="meta")
        # One zero, seen as a whole matrix: no combination reads the base weights.
        linear.weight = nn.Parameter(torch.zeros(1, 1).expand(pair.b.shape[0], pair.a.shape[1]), requires_grad=False)
        module.add_module(last, linear)
    rank = next(iter(adapters[0].layers.values())).rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(adapters[0].layers))
    model: Any = get_peft_model(root, config, adapter_name="part0")
    for number in range(1, len(adapters)):
        model.add_adapter(f"part{number}", config)
    with torch.no_grad():
        for number, adapter in enumerate(adapters):
            for name, pair in adapter.layers.items():
                layer: Any = model.base_model.model.get_submodule(name)
                layer.lora_A[f"part{number}"].weight.copy_(pair.a)
                layer.lora_B[f"part{number}"].weight.copy_(pair.b * pair.scale)
    return model
