"""PEFT adapter directory <-> `Adapter`: adapter_config.json beside adapter_model.safetensors.

Plain LoRA only. Anything else that PEFT can put in such a directory is refused by the name of the key that shows it,
because averaging or rotating it as if it were LoRA would be silently wrong.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.errors import AdapterError
from fedrot.core.files import read_tensors, tensor_bytes, write_atomic

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Config keys whose setting makes an adapter something other than W0 + scale * B A, with the harmless values.
_NOT_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
}
# Starting values that change the base weight itself, so the adapter fits no unchanged base model.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_adapter(folder: Path) -> Adapter:
    """Read the PEFT adapter in `folder`.

    Raises `AdapterError` naming the file or the key: no such folder, a bare file, a missing or damaged file, a factor
    without its partner, factors of different rank, tensors that are not plain LoRA, values that are not finite.
    """
    if folder.is_file():
        raise AdapterError(f"{folder}: this is a file; give the folder that holds {CONFIG_FILE} and {TENSOR_FILE}")
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    config = _read_config(folder / CONFIG_FILE)
    if not (folder / TENSOR_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"{folder / 'adapter_model.bin'}: pickled tensors are never loaded; save the adapter again as safetensors"
        )
    path = folder / TENSOR_FILE
    factors, head = _sort_keys(read_tensors(path, AdapterError), config, path)
    layers = {name: _pair(name, factors[name], config, path) for name in sorted(factors)}
    if not layers:
        raise AdapterError(f"{path}: holds no LoRA factors (keys that end in lora_A.weight and lora_B.weight)")
    return Adapter(layers=layers, head=head, config=config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; an adapter folder needs it beside {TENSOR_FILE}") from None
    except OSError as problem:
        raise AdapterError(f"{path}: cannot be read ({problem.strerror})") from None
    except ValueError as problem:
        raise AdapterError(f"{path}: not valid JSON ({problem})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: holds a {type(config).__name__}, not an object of settings")
    check_config(config, str(path))
    return config


def check_config(config: Mapping[str, Any], who: str) -> None:
    """Raise `AdapterError`, naming `who` and the key, unless PEFT's settings are those of plain LoRA."""
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterError(f"{who}: peft_type is {config['peft_type']!r}; only LORA adapters can be used")
    for key, harmless in _NOT_PLAIN.items():
        if key in config and config[key] not in harmless:
            raise AdapterError(f"{who}: {key} is {config[key]!r}; only plain LoRA adapters can be used")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(f"{who}: init_lora_weights {start!r} changes the base weights; only plain LoRA can be used")
    for key, pattern, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", (int, float))):
        if not _positive(config.get(key, 8), kind):
            raise AdapterError(f"{who}: {key} must be a positive number, got {config[key]!r}")
        found = config.get(pattern) or {}
        if not isinstance(found, dict):
            raise AdapterError(f"{who}: {pattern} must be an object, got {found!r}")
        for layer, value in found.items():
            if not (_expression(layer) and _positive(value, kind)):
                raise AdapterError(
                    f"{who}: {pattern} must map layer patterns to positive numbers, got {layer!r}: {value!r}"
                )
    saved = config.get("modules_to_save") or []
    if not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise AdapterError(f"{who}: modules_to_save must be a list of names, got {saved!r}")


def _positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


def _expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _sort_keys(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split the file's tensors in LoRA factors by layer and the head, refusing every other key."""
    saved = [re.escape(module) for module in config.get("modules_to_save") or []]
    # PEFT saves every module whose path ends in one of these names, dot or no dot before it.
    in_head = re.compile(rf"({'|'.join(saved)})\.") if saved else None
    factors: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path}: {key} holds values that are not finite (NaN or infinite)")
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match:
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_" in name:
            raise AdapterError(f"{path}: {key} is not a plain LoRA factor; only lora_A.weight and lora_B.weight are")
        elif in_head and in_head.search(name):
            head[name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")] = tensor
        else:
            raise AdapterError(f"{path}: {key} is neither a LoRA factor nor part of modules_to_save")
    return factors, head


def _pair(name: str, factors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> LoraPair:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in factors:
            raise AdapterError(f"{path}: {_PREFIX}{name}.lora_{side}.weight is missing, its lora_{other} is there")
    rank, scale = rank_and_scale(config, name)
    try:
        pair = LoraPair(factors["A"], factors["B"], scale, bool(config.get("fan_in_fan_out", False)))
    except AdapterError as problem:
        raise AdapterError(f"{path}: {_PREFIX}{name}: {problem}") from None
    if pair.rank != rank:
        raise AdapterError(
            f"{path}: {_PREFIX}{name}.lora_A.weight has rank {pair.rank}, {CONFIG_FILE} gives it rank {rank}"
        )
    return pair


def rank_and_scale(config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """A layer's r, and alpha / r or alpha / sqrt(r), by settings that `check_config` passed."""
    rank = _by_pattern(config.get("rank_pattern"), layer, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8))
    return rank, float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the layer's path, at a dot, wins."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write `adapter` as a PEFT adapter directory; each file appears whole or not at all.

    Ranks and scales are written from the factors (r, lora_alpha and the two patterns), so that what is loaded is what
    was in memory, whatever `adapter.config` said. Raises `AdapterError` naming the tensor that is not finite.
    """
    if not adapter.layers:
        raise AdapterError(f"{folder}: the adapter has no layers to save")
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.b
    tensors |= {_PREFIX + name: tensor for name, tensor in adapter.head.items()}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{folder}: {key} holds values that are not finite (NaN or infinite); not saved")
    config = json.dumps(_config_of(adapter, folder), indent=2, sort_keys=True)
    write_atomic(folder / TENSOR_FILE, tensor_bytes(tensors, {"format": "pt"}))
    write_atomic(folder / CONFIG_FILE, config.encode() + b"\n")


def _config_of(adapter: Adapter, folder: Path) -> dict[str, Any]:
    for name, pair in adapter.layers.items():
        if not _positive(pair.scale, (int, float)):
            raise AdapterError(f"{folder}: layer {name!r} has scale {pair.scale!r}, it must be a positive number")
    flags = {pair.fan_in_fan_out for pair in adapter.layers.values()}
    if len(flags) > 1:
        raise AdapterError(f"{folder}: layers differ in fan_in_fan_out, which PEFT's format cannot say")
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "target_modules": sorted(adapter.layers),
        "task_type": None,
        "use_rslora": False,
        **adapter.config,
        "fan_in_fan_out": flags.pop(),
    }
    if adapter.head and not config.get("modules_to_save"):
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in adapter.head})
    rslora = bool(config["use_rslora"])
    ranks = {name: pair.rank for name, pair in adapter.layers.items()}
    alphas = {n: _tidy(p.scale * (math.sqrt(p.rank) if rslora else p.rank)) for n, p in adapter.layers.items()}
    for key, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        usual = Counter(values.values()).most_common(1)[0][0]
        config[key] = usual
        config[pattern] = {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}
    return config


def _tidy(alpha: float) -> int | float:
    """2.0000000000000004 -> 2: alpha went through a division by the rank and comes back with its rounding."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha
