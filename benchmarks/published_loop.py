"""What fedrot is compared with: the loop of the published code, written by hand with PyTorch and PEFT and nothing else.

Every row is padded to one length, clients are trained one after the other, in float32, and the global model is
scored on a fixed set of rows each round. Model, factors, examples and optimizer are those of the simulated round; the
batches are collated beforehand, so the loop does not even pay for that.
"""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.methods.base import Broadcast
from fedrot.learning.batching import shuffled_batches
from fedrot.learning.encoding import Encoded
from fedrot.learning.evaluation import chosen_rows
from fedrot.learning.loading import model_path
from fedrot.running.prepare import Prepared
from fedrot.running.recipe import Recipe


class PublishedLoop:
    """One round of local training of every client on a plain PEFT model, and its evaluation."""

    def __init__(self, ready: Prepared, broadcast: Broadcast, length: int = 128) -> None:
        from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        warnings.simplefilter("ignore", FutureWarning)
        recipe, self.length = ready.recipe, length
        self.labels, path = len(ready.dataset.labels), model_path(recipe.model)
        if self.labels:
            base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=self.labels)
        else:
            base = AutoModelForCausalLM.from_pretrained(path)
        rank, kind = recipe.lora.rank, TaskType.SEQ_CLS if self.labels else TaskType.CAUSAL_LM
        config = LoraConfig(task_type=kind, r=rank, lora_alpha=2 * rank, lora_dropout=recipe.lora.dropout)
        self.model: Any = get_peft_model(base, config)
        self.model.eval()
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train()
        self.read, self.write = get_peft_model_state_dict, set_peft_model_state_dict
        self.recipe = recipe
        self.start = self._state(broadcast)
        self.batches = [self._batches(recipe, ready, broadcast, client) for client in sorted(ready.partition.clients)]
        data, split = ready.encoded[recipe.evaluation.split], recipe.evaluation.split
        rows = chosen_rows(len(data), recipe.evaluation.limit, recipe.seed, split)
        pieces = [rows[i : i + recipe.evaluation.batch] for i in range(0, len(rows), recipe.evaluation.batch)]
        self.scored = [self._padded(data, piece) for piece in pieces]

    def _state(self, broadcast: Broadcast) -> dict[str, Tensor]:
        state = {}
        for name, pair in broadcast.adapter.layers.items():
            state[f"base_model.model.{name}.lora_A.weight"] = pair.a
            state[f"base_model.model.{name}.lora_B.weight"] = pair.b
        return state | {f"base_model.model.{name}": t for name, t in broadcast.adapter.head.items()}

    def _padded(self, data: Encoded, rows: NDArray[np.int64]) -> tuple[dict[str, Tensor], Tensor]:
        inputs, labels = data.batch(rows)
        if data.learnt is not None:
            labels = torch.full((len(rows), self.length), -100)
            for place, row in enumerate(rows):
                span = slice(data.offsets[row], data.offsets[row + 1])
                tokens = torch.from_numpy(data.tokens[span].astype(np.int64))
                learnt = torch.from_numpy(data.learnt[span].copy())
                labels[place, : len(tokens)] = torch.where(learnt, tokens, -100)
        missing = self.length - inputs["input_ids"].shape[1]
        fill = {"input_ids": data.pad}
        wide = {n: torch.nn.functional.pad(t, (0, missing), value=fill.get(n, 0)) for n, t in inputs.items()}
        return wide, labels

    def _batches(
        self, recipe: Recipe, ready: Prepared, broadcast: Broadcast, client: str
    ) -> list[tuple[dict[str, Tensor], Tensor]]:
        data, indices = ready.encoded["train"], ready.partition.indices["train"][client]
        key = (recipe.seed, broadcast.round, client)
        order = shuffled_batches(data.lengths[indices], recipe.local.batch, key)
        return [self._padded(data, indices[next(order)]) for _ in range(recipe.local.steps or 1)]

    def evaluate(self) -> float:
        """The accuracy of the global model, or a language model's loss."""
        self.write(self.model, self.start)
        found = 0.0
        with torch.no_grad():
            for inputs, labels in self.scored:
                if self.labels:
                    found += float((self.model(**inputs).logits.argmax(-1) == labels).sum())
                else:
                    found += len(labels) * float(self.model(**inputs, labels=labels).loss)
        return found / sum(len(labels) for _, labels in self.scored)

    def round(self) -> list[dict[str, Tensor]]:
        """Every client's trained state."""
        trained = []
        for batches in self.batches:
            self.write(self.model, self.start)
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=self.recipe.local.lr, weight_decay=0.0)
            for inputs, labels in batches:
                self.model(**inputs, labels=labels).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            trained.append({name: t.detach().clone() for name, t in self.read(self.model).items()})
        return trained
