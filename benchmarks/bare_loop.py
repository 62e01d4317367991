"""What fedrot is compared with: the training loop that one would write by hand with PyTorch and PEFT, and nothing else.

The same model, factors, batches and optimizer as a simulated round, client after client; factors are put in and read
out as state dicts. The batches are collated beforehand, so the loop does not even pay for that.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from fedrot.core.methods.base import Broadcast
from fedrot.learning.batching import shuffled_batches
from fedrot.learning.models import model_path
from fedrot.running.prepare import Prepared
from fedrot.running.recipe import Recipe


class BareLoop:
    """One round of local training of every client on a plain PEFT model."""

    def __init__(self, recipe: Recipe, ready: Prepared, broadcast: Broadcast) -> None:
        from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        from transformers import AutoModelForSequenceClassification

        warnings.simplefilter("ignore", FutureWarning)
        base = AutoModelForSequenceClassification.from_pretrained(
            model_path(recipe.model), num_labels=len(ready.dataset.labels)
        )
        rank = recipe.lora.rank
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, lora_dropout=recipe.lora.dropout)
        self.model: Any = get_peft_model(base, config)
        self.model.eval()
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train()
        self.read, self.write = get_peft_model_state_dict, set_peft_model_state_dict
        self.recipe = recipe
        self.start = self._state(broadcast)
        self.batches = [self._batches(recipe, ready, broadcast, client) for client in sorted(ready.partition.clients)]

    def _state(self, broadcast: Broadcast) -> dict[str, Tensor]:
        state = {}
        for name, pair in broadcast.adapter.layers.items():
            state[f"base_model.model.{name}.lora_A.weight"] = pair.a
            state[f"base_model.model.{name}.lora_B.weight"] = pair.b
        return state | {f"base_model.model.{name}": t for name, t in broadcast.adapter.head.items()}

    @staticmethod
    def _batches(
        recipe: Recipe, ready: Prepared, broadcast: Broadcast, client: str
    ) -> list[tuple[dict[str, Tensor], Tensor]]:
        data, indices = ready.encoded["train"], ready.partition.indices["train"][client]
        key = (recipe.seed, broadcast.round, client)
        order = shuffled_batches(data.lengths[indices], recipe.local.batch, key)
        return [data.batch(indices[next(order)]) for _ in range(recipe.local.steps or 1)]

    def round(self) -> list[dict[str, Tensor]]:
        """Every client's trained state."""
        trained = []
        for batches in self.batches:
            self.write(self.model, self.start)
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=self.recipe.local.lr, weight_decay=0.0)
            for inputs, labels in batches:
                loss = torch.nn.functional.cross_entropy(self.model(**inputs).logits, labels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            trained.append({name: t.detach().clone() for name, t in self.read(self.model).items()})
        return trained
