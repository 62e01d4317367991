"""The base model with PEFT's adapters in it: loaded once, shared by every client; only factors and head are swapped."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedrot.core.adapter import Adapter, LoraPair, same_form
from fedrot.core.errors import DataError
from fedrot.learning.architectures import first_position, packable, packed_logits, packed_states, reads_last
from fedrot.learning.batching import Batch, packed, padded, padded_layout
from fedrot.learning.dropout import Key, KeyedDropout
from fedrot.learning.encoding import Encoded
from fedrot.learning.vocabulary import token_losses

PEFT_NAME = "default"


class ResidentModel:
    """A sequence classifier or a language model with LoRA layers. Read and write its adapter; call it for logits or
    losses.

    `tokenizer` belongs to it. The base weights are frozen and stay as they were loaded.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper

        self.model = model
        self.tokenizer = tokenizer
        self._lora: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._modules: dict[str, Any] = {}  # layer -> PEFT's module, which holds its scale and its base weight
        self._flags: dict[str, bool] = {}  # layer -> fan_in_fan_out
        self._head: dict[str, nn.Parameter] = {}
        self._head_modules: dict[str, Any] = {}  # name -> PEFT's wrapper of a module that is trained in full
        self._dropouts: list[KeyedDropout] = []
        inner = model.base_model.model
        for name, module in inner.named_modules():
            if isinstance(module, LoraLayer):
                factors: list[Any] = [module.lora_A[PEFT_NAME].weight, module.lora_B[PEFT_NAME].weight]
                self._lora[name] = (factors[0], factors[1])
                self._modules[name] = module
                self._flags[name] = bool(getattr(module, "fan_in_fan_out", False))
                dropout = KeyedDropout(getattr(module.lora_dropout[PEFT_NAME], "p", 0.0), name)
                module.lora_dropout[PEFT_NAME] = dropout
                self._dropouts.append(dropout)
            elif isinstance(module, ModulesToSaveWrapper):
                self._head_modules[name] = module
                for key, parameter in module.modules_to_save[PEFT_NAME].named_parameters():
                    self._head[f"{name}.{key}"] = parameter
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        own = {id(p) for _, p in self.parameters(frozenset({"a", "b", "head"}))}
        # PEFT keeps the fresh, unused head beside the one that is trained; it is no part of the base model.
        self._base = {n: p for n, p in inner.named_parameters() if id(p) not in own and ".original_module." not in n}
        self._original: dict[str, tuple[Tensor, Tensor | None]] = {}  # weight and bias of changed layers, as loaded
        self._delta: Adapter | None = None
        self._start = self.read()

    def read(self) -> Adapter:
        """A copy of the adapter that is in the model now; adapters are always in the CPU's memory."""

        def copied(parameter: Tensor) -> Tensor:
            return parameter.detach().to("cpu", copy=True)

        layers = {
            name: LoraPair(copied(a), copied(b), self._scale(name), self._flags[name])
            for name, (a, b) in self._lora.items()
        }
        return Adapter(layers, {n: copied(p) for n, p in self._head.items()}, self.config())

    def write(self, adapter: Adapter) -> None:
        """Put an adapter of this model's layers into it; its ranks and scales may be others than those there now."""
        with torch.no_grad():
            for name, (a, b) in self._lora.items():
                pair = adapter.layers[name]
                for parameter, tensor in ((a, pair.a), (b, pair.b)):
                    if parameter.shape != tensor.shape:
                        parameter.data = torch.empty_like(tensor, dtype=parameter.dtype, device=parameter.device)
                    parameter.copy_(tensor)
                self._modules[name].scaling[PEFT_NAME] = pair.scale
            for name, parameter in self._head.items():
                parameter.copy_(adapter.head[name])

    def change_base(self, delta: Adapter | None) -> None:
        """Make the base weights what was loaded plus `delta`'s updates; None: what was loaded.

        Changed layers are held and computed in float32, also under autocast: bfloat16 would round small changes away.
        """
        if delta is self._delta:
            return
        for name, module in self._modules.items():
            layer = module.get_base_layer()
            if delta is None:
                weight, bias = self._original.pop(name)
                del layer.forward
            else:
                if name not in self._original:
                    self._original[name] = layer.weight.data, None if layer.bias is None else layer.bias.data
                    layer.forward = _in_float32(layer.forward)
                loaded, bias = self._original[name]
                weight = (loaded.float() + delta.layers[name].delta().to(loaded.device)).contiguous()
                bias = None if bias is None else bias.float()
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias
        self._delta = delta

    def _scale(self, name: str) -> float:
        return float(self._modules[name].scaling[PEFT_NAME])

    def parameters(self, parts: frozenset[str]) -> list[tuple[str, nn.Parameter]]:
        """(flat name, parameter) of the adapter's parts 'a', 'b', 'head'."""
        found: list[tuple[str, nn.Parameter]] = []
        for name, (a, b) in self._lora.items():
            found += [(f"layers/{name}/a", a)] if "a" in parts else []
            found += [(f"layers/{name}/b", b)] if "b" in parts else []
        return found + ([(f"head/{n}", p) for n, p in self._head.items()] if "head" in parts else [])

    def to(self, device: torch.device) -> None:
        """Move the whole model."""
        self.model.to(device)

    def replica(self, device: torch.device) -> "ResidentModel":
        """A model of its own with the same adapter, for a worker beside this one; on one device the base is shared."""
        shared: dict[int, Any] = {}
        if device == self.device:
            for parameter in self._base.values():
                # A parameter of its own, so that a change of the base stays with its model, on the same memory.
                shared[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
        return ResidentModel(copy.deepcopy(self.model, shared).to(device), self.tokenizer)

    def lora_modules(self) -> Mapping[str, Any]:
        """PEFT's module of every adapted layer; its `get_base_layer()` is the layer itself."""
        return self._modules

    def head_modules(self) -> Mapping[str, tuple[Any, nn.Module]]:
        """For each module that is trained in full: PEFT's wrapper, which the model calls, and the module in it."""
        return {name: (wrapper, wrapper.modules_to_save[PEFT_NAME]) for name, wrapper in self._head_modules.items()}

    def dropout(self) -> float:
        """The share that LoRA dropout drops."""
        return self._dropouts[0].p

    def set_dropout_key(self, key: Key | None) -> None:
        """Switch LoRA dropout on with masks of this name, or off."""
        for dropout in self._dropouts:
            dropout.key = key

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return next(iter(self._base.values())).device

    @property
    def causal(self) -> bool:
        """Whether this is a language model that writes on, and no classifier."""
        return bool(self.model.peft_config[PEFT_NAME].task_type == "CAUSAL_LM")

    @property
    def packable(self) -> bool:
        """Whether examples can be packed into one row; see architectures.py."""
        return packable(self.model.base_model.model)

    def collate(self, data: Encoded, rows: NDArray[np.int64], packing: bool) -> Batch:
        """These examples as a batch for this model."""
        inner = self.model.base_model.model
        return packed(data, rows, first_position(inner), reads_last(inner)) if packing else padded(data, rows)

    def forward(self, batch: Batch, precision: str) -> Tensor:
        """(n, labels) for the examples of a batch; `precision` is 'fp32' or 'bf16' (autocast)."""
        if batch.packing is None:
            return self.logits(batch.inputs, precision)
        with self.autocast(precision):
            return self._packed(packed_logits, batch)

    def token_losses(self, batch: Batch, precision: str) -> tuple[Tensor, Tensor]:
        """A language model's (losses, hits), both (U), for the tokens of a batch that it is to write: cross-entropy,
        and whether the likeliest token is the right one.
        """
        targets = batch.labels.to(self.device)
        with self.autocast(precision):
            if batch.packing is not None:
                head = self.model.base_model.model.get_output_embeddings()
                return token_losses(self._packed(packed_states, batch), head, targets)
            logits = self.logits(batch.inputs, precision).flatten(0, 1)
            read = batch.layout.read
            rows = read if batch.layout.places is None else batch.layout.places[read]
            scores = logits[rows.to(self.device)]
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            losses = nn.functional.cross_entropy(scores, targets, reduction="none")
            return losses, scores.argmax(-1) == targets

    def autocast(self, precision: str) -> torch.autocast:
        """The arithmetic of 'fp32' or 'bf16' on the model's device."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def _packed(self, read_by: Callable[..., Tensor], batch: Batch) -> Tensor:
        """`packed_logits` or `packed_states` of a packed batch."""
        if batch.packing is None:
            raise ValueError("this batch is padded")
        inputs = {name: tensor[0].to(self.device) for name, tensor in batch.inputs.items()}
        return read_by(
            self.model.base_model.model,
            inputs["input_ids"],
            inputs.get("token_type_ids"),
            inputs["position_ids"],
            batch.layout.read.to(self.device),
            batch.packing.to(self.device),
        )

    def logits(self, inputs: Mapping[str, Tensor], precision: str) -> Tensor:
        """(n, labels), or (n, longest, vocabulary) of a language model, for the inputs of a padded batch."""
        moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        masked = any(dropout.key is not None for dropout in self._dropouts)
        layout = padded_layout(inputs["attention_mask"]) if masked else None
        for dropout in self._dropouts:
            dropout.layout = layout
        with self.autocast(precision):
            out: Tensor = self.model(**moved).logits
        return out

    def longest(self) -> int | None:
        """The most tokens that the model has positions for; None where it does not say."""
        found: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return None if found is None else found - first_position(self.model.base_model.model)

    def config(self) -> dict[str, Any]:
        """What adapter_config.json needs, as plain values."""
        config = self.model.peft_config[PEFT_NAME].to_dict()
        plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
        return plain | {"inference_mode": True}

    def fingerprint(self) -> str:
        """A hash of the base weights: two sites with the same one hold the same base model."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._base):
            digest.update(name.encode())
            digest.update(self._base[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def fit(self, adapter: Adapter, where: str, any_rank: bool = False) -> Adapter:
        """`adapter`, which came from elsewhere, as one for this model; `DataError` naming `where` if it is not.

        With `any_rank` its ranks and scales may be others than the recipe's, as they are of one that holds a change of
        the base model; it can then be scored but not trained on.
        """
        mine = self._start
        form = _at_ranks_of(mine, adapter) if any_rank else mine
        try:
            same_form(adapter, form, who=where)
        except ValueError as problem:
            raise DataError(f"{problem} (the model with the recipe's lora settings)") from None
        if any_rank:
            return replace(adapter.map(lambda t: t.to(torch.float32)), config=mine.config)
        for name, pair in mine.layers.items():
            if abs(adapter.layers[name].scale - pair.scale) > 1e-9 * pair.scale:
                raise DataError(
                    f"{where}: layer {name!r} has scale {adapter.layers[name].scale:g}, the recipe's lora settings "
                    f"give {pair.scale:g} (alpha / r); set lora.alpha to match"
                )
        filled = mine.with_tensors({n: t.to(torch.float32) for n, t in adapter.tensors()})
        return replace(filled, config=mine.config)


def _in_float32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same layer without autocast."""

    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    return run


def _at_ranks_of(form: Adapter, other: Adapter) -> Adapter:
    """`form` with the ranks of `other` where it has the layer: what is left to compare are names and outer shapes."""
    layers = {}
    for name, pair in form.layers.items():
        rank = other.layers[name].rank if name in other.layers else pair.rank
        a, b = pair.a.new_zeros(rank, pair.a.shape[1]), pair.b.new_zeros(pair.b.shape[0], rank)
        layers[name] = replace(pair, a=a, b=b)
    return replace(form, layers=layers)
