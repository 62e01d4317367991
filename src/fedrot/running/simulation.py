"""The embedded engine: every client in this process, one after the other, on one resident base model."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Broadcast, ClientState, Upload
from fedrot.learning.evaluation import Evaluation, How, chosen_rows, evaluate
from fedrot.learning.generation import warn_of_cut
from fedrot.learning.local import LocalFailure, step_count
from fedrot.learning.models import ResidentModel
from fedrot.learning.tasks.answers import by_answers
from fedrot.running.client import ClientData, Round, own_model, play_clients
from fedrot.running.engine import Failure, Summed
from fedrot.running.prepare import Prepared, problems
from fedrot.running.recipe import Recipe
from fedrot.running.secure import SecureSum, in_the_clear, total_weight
from fedrot.running.workers import Item, Result, Workers

EVERYONE = "everyone"  # the one client of centralised training


class Simulation:
    """Clients that share a process; see `engine.Engine`."""

    def __init__(self, ready: Prepared) -> None:
        recipe, partition = ready.recipe, ready.partition
        self._recipe, self._encoded, self._partition = recipe, ready.encoded, partition
        self._dataset = ready.dataset
        self._workers = Workers(ready.model, recipe.compute)
        self._states: dict[str, ClientState] = {}
        self._pending: dict[str, ClientState] = {}  # of the round that runs, until its uploads are accepted
        self._asked: dict[str, Round] = {}  # likewise, where a second phase will ask for what was trained
        self._round = 0
        data = ready.encoded["train"]
        self._data = {name: ClientData(name, data, indices) for name, indices in partition.indices["train"].items()}
        if recipe.method.capabilities.pooled:
            everything = np.sort(np.concatenate(list(partition.indices["train"].values())))
            steps = recipe.local.steps and recipe.local.steps * len(partition.clients)
            self._recipe = replace(recipe, local=replace(recipe.local, steps=steps))
            self._data = {EVERYONE: ClientData(EVERYONE, data, everything)}

    @property
    def clients(self) -> Sequence[str]:
        """Every client's name, sorted."""
        return sorted(self._data)

    @property
    def held(self) -> Mapping[str, int]:
        """Every client's number of training examples."""
        return {name: len(client.indices) for name, client in self._data.items()}

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """All clients are there."""

    def steps(self, client: str) -> int:
        """The local steps that a client takes in a round."""
        return step_count(len(self._data[client].indices), self._recipe.local)

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """One round of local training."""
        self._round = broadcast.round
        for _, made in self.rounds(broadcast, clients):
            yield made.upload if isinstance(made, Round) else made

    def train_summed(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Summed | Failure]:
        """The same, of which the sum alone is seen."""
        held = {name: len(self._data[name].indices) for name in clients}
        of = SecureSum.of_uploads(self._recipe, broadcast, total_weight(self._recipe, held.values()))
        return in_the_clear(self.train(broadcast, clients), of, held)

    def rounds(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[tuple[str, Round | Failure]]:
        """What each client makes of a round, as many at once as a stack has."""
        self._pending, self._asked = {}, {}
        # Stacks of like width, so that workers end together.
        count = -(-len(clients) // (self._recipe.compute.stack or 1))
        stacks = [[clients[i] for i in places] for places in np.array_split(np.arange(len(clients)), count)]

        def work(model: ResidentModel, names: Sequence[str]) -> list[tuple[str, Round | LocalFailure]]:
            together = [(self._data[name], self._states.get(name, {})) for name in names]
            return list(play_clients(together, broadcast, self._recipe, model))

        for stack in self._map(broadcast, work, stacks):
            for name, made in stack:
                if isinstance(made, LocalFailure):
                    yield name, Failure(name, str(made))
                    continue
                self._pending[name] = made.kept
                if self._recipe.method.capabilities.second_phase:
                    self._asked[name] = made
                yield name, made

    def answer(self, question: Adapter, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """Every client's answer, from the factors that it trained in this round."""
        for name in clients:
            made = self._asked[name]
            yield replace(made.upload, adapter=self._recipe.method.answer(made.trained, question), rotation={})

    def answer_summed(self, question: Adapter, clients: Sequence[str]) -> Iterator[Summed | Failure]:
        """The same, of which the sum alone is seen."""
        held = {name: len(self._data[name].indices) for name in clients}
        of = SecureSum.of_answers(self._recipe, self._round, question, total_weight(self._recipe, held.values()))
        return in_the_clear(self.answer(question, clients), of, held)

    def settle(self, accepted: Collection[str]) -> None:
        """Keep what the accepted clients would keep; a client that was dropped stays as it was."""
        self._states |= {name: kept for name, kept in self._pending.items() if name in accepted and kept}
        self._pending, self._asked = {}, {}

    def evaluate(self, broadcast: Broadcast, split: str, limit: int | None = None) -> Evaluation:
        """Score on fixed rows of the split; where models are personal, each client's rows by its own."""
        settings, data = self._recipe.evaluation, self._encoded[split]
        parts = self._partition.indices[split]
        held = np.sort(np.concatenate(list(parts.values())))  # all of it, but where other clients are elsewhere
        rows = held[chosen_rows(len(held), limit, self._recipe.seed, split)]
        adapters = self._adapters(broadcast)
        how = How(settings.batch, self._recipe.local.precision, bool(self._recipe.compute.packing))
        return evaluate(partial(self._map, broadcast), adapters, data, split, parts, rows, how)

    def answers(self, broadcast: Broadcast, split: str) -> Evaluation:
        """Score what the model writes on fixed problems of the split."""
        settings, data = self._recipe.evaluation, self._encoded[split]
        adapters = self._adapters(broadcast)
        chosen = chosen_rows(len(data), settings.problems, self._recipe.seed, split)
        how = How(settings.batch, self._recipe.local.precision)
        scored = by_answers(problems(self._recipe, self._dataset, split), how)
        spread, parts = partial(self._map, broadcast), self._partition.indices[split]
        found = evaluate(spread, adapters, data, split, parts, chosen, how, scored)
        warn_of_cut(round(found.scores["cut"] * found.examples), found.examples)
        return found

    def _adapters(self, broadcast: Broadcast) -> dict[str, Adapter]:
        """What is scored: the global adapter, or each client's own."""
        return self.finish(broadcast) or {"": broadcast.adapter}

    def _map(
        self, broadcast: Broadcast, work: Callable[[ResidentModel, Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """`work` on every item by models whose base is changed as the broadcast says."""

        def on_base(model: ResidentModel, item: Item) -> Result:
            model.change_base(broadcast.base_delta)
            return work(model, item)

        return self._workers.map(on_base, items)

    def own_model(self, broadcast: Broadcast, client: str) -> Adapter:
        """The adapter that a client would use itself."""
        return own_model(self._recipe, broadcast, client, self._states.get(client, {}))

    def finish(self, broadcast: Broadcast) -> dict[str, Adapter]:
        """Each client's own model, where models are personal."""
        return {name: self.own_model(broadcast, name) for name in self.clients} if personal(self._recipe) else {}

    def states(self) -> Mapping[str, ClientState]:
        """What the clients keep between rounds."""
        return dict(self._states)

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put back what `states` gave."""
        self._states = dict(states)


def personal(recipe: Recipe) -> bool:
    """Whether each client's model is its own, by its head or by the method."""
    return recipe.lora.head == "personal" or recipe.method.capabilities.personal
