"""The model without PEFT and without fedrot's own code, its weights written out: W0 + s B A in float64."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedrot.core.adapter import Adapter, LoraPair


def dense_logits(folder: Path, inputs: Mapping[str, Tensor], *adapters: Adapter, pad: int = 0) -> Tensor:
    """Logits of the model in `folder` with the updates of all `adapters` in its weights and the first one's head.

    `pad` is the token that fills batches up.
    """
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).double().eval()
    model.config.pad_token_id = pad  # a decoder reads its answer off the last token that is none
    with torch.no_grad():
        for adapter in adapters:
            for name, pair in adapter.layers.items():
                layer = model.get_submodule(name)
                update = pair.scale * pair.b.double() @ pair.a.double()
                layer.weight += update if isinstance(layer, nn.Linear) else update.T  # Conv1D lies the other way
        for name, tensor in adapters[0].head.items():
            model.get_parameter(name).copy_(tensor)
        return model(**inputs).logits


def at_ranks(form: Adapter, ranks: list[int], scale: float, seed: int, size: float = 0.2) -> Adapter:
    """A random adapter of these layers and this head, whose layers have the ranks in turn."""
    rng = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return size * torch.randn(shape, generator=rng)

    layers = {}
    for place, (name, pair) in enumerate(form.layers.items()):
        rank = ranks[place % len(ranks)]
        a, b = noise(rank, pair.a.shape[1]), noise(pair.b.shape[0], rank)
        layers[name] = LoraPair(a, b, scale, pair.fan_in_fan_out)
    head = {name: tensor + noise(*tensor.shape) for name, tensor in form.head.items()}
    return Adapter(layers, head, form.config)
