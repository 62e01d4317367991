"""The embedded engine: every client in this process, one after the other, on one resident base model."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Broadcast, ClientState, Upload
from fedrot.learning.encoding import Encoded
from fedrot.learning.evaluation import Evaluation, chosen_rows, evaluate
from fedrot.learning.local import LocalFailure
from fedrot.learning.models import ResidentModel
from fedrot.learning.partition import Partition
from fedrot.running.client import ClientData, client_round, with_own_head
from fedrot.running.engine import Failure
from fedrot.running.recipe import Recipe


class Simulation:
    """Clients that share a process; see `engine.Engine`."""

    def __init__(
        self, recipe: Recipe, model: ResidentModel, encoded: Mapping[str, Encoded], partition: Partition
    ) -> None:
        self._recipe, self._model, self._encoded, self._partition = recipe, model, encoded, partition
        self._states: dict[str, ClientState] = {}
        self._pending: dict[str, ClientState] = {}  # of the round that runs, until its uploads are accepted

    @property
    def clients(self) -> Sequence[str]:
        """Every client's name, sorted."""
        return sorted(self._partition.clients)

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Upload | Failure]:
        """One round of local training, client after client."""
        for name in clients:
            client = ClientData(name, self._encoded["train"], self._partition.indices["train"][name])
            state = self._states.get(name, {})
            try:
                upload, kept = client_round(client, broadcast, state, self._recipe, self._model)
            except LocalFailure as problem:
                yield Failure(name, str(problem))
                continue
            self._pending[name] = kept
            yield upload

    def settle(self, accepted: Collection[str]) -> None:
        """Keep what the accepted clients would keep; a client that was dropped stays as it was."""
        self._states |= {name: kept for name, kept in self._pending.items() if name in accepted and kept}
        self._pending = {}

    def evaluate(self, adapter: Adapter, split: str, limit: int | None = None) -> Evaluation:
        """Score on fixed rows of the split; with personal heads, each client's rows by its own model."""
        settings, data = self._recipe.evaluation, self._encoded[split]
        parts = self._partition.indices[split]
        rows = chosen_rows(len(data), limit, self._recipe.seed, split)
        adapters = {"": adapter}
        if self._recipe.lora.head == "personal":
            adapters = {name: self.personal(adapter, name) for name in self.clients}
        precision = self._recipe.local.precision
        return evaluate(self._model, adapters, data, split, parts, rows, settings.batch, precision)

    def personal(self, adapter: Adapter, client: str) -> Adapter:
        """The global factors with the client's own head, where it keeps one."""
        return with_own_head(adapter, self._states.get(client, {}))

    def states(self) -> Mapping[str, ClientState]:
        """What the clients keep between rounds."""
        return dict(self._states)

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put back what `states` gave."""
        self._states = dict(states)
