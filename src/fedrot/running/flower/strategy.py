"""fedrot's server methods in a Flower app of your own: one line, `FedRotStrategy(method="fedrot")` for `FedAvg()`.

For apps whose train messages carry PEFT's state of an adapter (`get_peft_model_state_dict`) as an ArrayRecord, as
FlowerTune's do. Clients need nothing of fedrot. A reply that cannot be used is dropped alone, with the reason.
"""

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.alignment import check_finite
from fedrot.core.checks import RejectedUpload, check_upload
from fedrot.core.diagnostics import Watch, observer
from fedrot.core.errors import AdapterError, FedrotError, RecipeError, RunError, choices
from fedrot.core.methods import get_method, methods
from fedrot.core.methods.base import ALL_PARTS, Broadcast, Method, Reduced, Seat, ServerState, Upload
from fedrot.core.peft_format import check_config, rank_and_scale
from fedrot.core.reduce import Reduction
from fedrot.core.seeding import generator, seed_of
from fedrot.core.settings import CheckSettings, DiagnosticsSettings
from fedrot.running.flower.replies import content_of, mean_metrics, weight_of
from fedrot.running.flower.state import ALIGNED, read_state, write_state

Side = Literal["server", "client"]

_EVERY_ROUND = DiagnosticsSettings()
_LOG = logging.getLogger("fedrot")


@dataclass
class _Round:
    """A round on its way: what was sent to whom, and what came of it."""

    form: ArrayRecord
    broadcast: Broadcast
    asked: tuple[int, ...]
    dropped: dict[int, str] = field(default_factory=dict)  # node -> why


class FedRotStrategy(FedAvg):
    """Flower's FedAvg with the averaging, the checks and the diagnostics of fedrot.

    A round's MetricRecord has, beside the clients' own metrics, `fedrot-replies-used`, `fedrot-replies-dropped` and, as
    shares of the ideal update's norm, `fedrot-error-before` and `-after` alignment of averaging factor by factor,
    `-sent` of what the server made, and `-floor` of the best adapter of this rank (`AggregationErrors`). Arrays keep
    their keys, shapes and dtypes. A round without a usable reply leaves them as they are, and the next one goes on.
    """

    def __init__(
        self,
        method: str = "fedrot",
        *,
        align: Side = "server",
        lora_config: Any = None,
        max_norm: float | None = None,
        diagnostics: DiagnosticsSettings = _EVERY_ROUND,
        patience: float = 3600.0,
        **settings: Any,
    ) -> None:
        """A strategy for `method`.

        Args:
            method: one that needs nothing but what clients of any app send.
            align: where factors are turned. 'server': here, every reply to what was sent in its round. 'client': the
                clients have done it, by `align_mod` or `fedrot.align`, and here nothing is turned: a turn of `strength`
                0.4 done twice would be one of more. Replies that `align_mod` has turned are dropped under 'server'.
            lora_config: PEFT's LoraConfig of the app, or a mapping with its keys. It gives each layer's alpha / r, by
                which layers count in the errors; without it they count alike. What a method makes does not depend on it
                (the search of fedrot_consensus goes by other steps to the same error).
            max_norm: the largest allowed norm of a reply's change, all arrays together; None: any.
            diagnostics: when and how exactly errors are measured; `every=0`: never.
            patience: the seconds to wait for as many nodes as a round needs.
            settings: FedAvg's (fraction_train, weighted_by_key, ...) and the method's (strength, ...).

        Raises:
            ValueError: an unknown method or setting, a method that an app's clients cannot follow, settings out of
                range.
        """
        kind = served(method)
        own = {f.name for f in fields(kind)}
        flower = set(inspect.signature(FedAvg.__init__).parameters) - {"self"}
        if unknown := sorted(set(settings) - own - flower):
            raise RecipeError(
                f"FedRotStrategy: {unknown[0]!r} is a setting neither of method {method!r}, which has "
                f"{choices(own) or 'none'}, nor of Flower's FedAvg, which has {choices(flower)}"
            )
        if align not in get_args(Side):
            raise RecipeError(f"FedRotStrategy: align must be {choices(get_args(Side))}, got {align!r}")
        if max_norm is not None and not 0 < max_norm < float("inf"):
            raise RecipeError(f"FedRotStrategy: max_norm must be above 0, or None, got {max_norm!r}")
        for key in ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"):
            if settings.get(key) is None:
                settings[key] = mean_metrics
        super().__init__(**{key: value for key, value in settings.items() if key not in own})
        self.method = kind(**{key: value for key, value in settings.items() if key in own})
        self.align = align
        self.patience = patience
        self._turns = align == "server" and kind.client is not Method.client
        self._config = _config_of(lora_config)
        self._checks = CheckSettings(max_norm)
        self._diagnostics = diagnostics
        self._forget()

    def _forget(self) -> None:
        self._memory: Mapping[str, Tensor] = {}
        self._round: _Round | None = None
        self._good = 0

    def summary(self) -> None:
        """Log the settings."""
        words = ", ".join(f"{key}={value!r}" for key, value in self.method.settings().items())
        logging.getLogger("flwr").info("\t├──> %s(%s), aligned at the %s", self.method.name, words, self.align)
        super().summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Flower's loop of rounds. Raises `RunError` where it ends and no reply of any round was usable."""
        self._forget()
        result = super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        if self._round is not None and not self._good:
            raise RunError(
                "FedRotStrategy: no reply of any round could be used, so nothing was learned; in the last round: "
                + "; ".join(f"node {node}: {reason}" for node, reason in self._round.dropped.items())
            )
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg's, when enough nodes are there.

        Raises `AdapterError` where the arrays are no state of a plain LoRA adapter, `RunError` where nodes are missing.
        """
        if self.fraction_train == 0.0:
            return []
        adapter = self._read(arrays)
        if missing := self._missing(grid, self.min_train_nodes):
            raise RunError(f"FedRotStrategy: round {server_round}: {missing} (min_train_nodes, min_available_nodes)")
        messages = list(super().configure_train(server_round, arrays, config, grid))
        asked = tuple(message.metadata.dst_node_id for message in messages)
        self._round = _Round(arrays, Broadcast(server_round - 1, adapter), asked)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the method makes of the usable replies, and the round's metrics; no arrays where there is no such reply.

        Replies are read in the order of their nodes, whatever order they came in.
        """
        if self._round is None or self._round.broadcast.round != server_round - 1:
            return None, None  # nobody was asked
        this = self._round
        number, form = this.broadcast.round, this.broadcast.adapter
        keep = self.method.capabilities.reduction == "factors"
        reduction = Reduction(form, self.method.uploads(number), keep)
        watch = observer(self._diagnostics, number, len(this.asked), seed_of("flower", number))
        this.dropped = dict.fromkeys(this.asked, "gave no answer")
        used: dict[int, RecordDict] = {}
        for node, reply in _by_node(replies):
            this.dropped.pop(node, None)
            try:
                upload, weight = self._take_in(reply, this.broadcast)
            except FedrotError as problem:
                this.dropped[node] = _line(problem)
                continue
            reduction.add(upload.adapter, weight)
            if watch is not None:
                watch.add(upload, weight)
            used[node] = reply.content
        made = self._serve(this.broadcast, reduction.result()) if used else None
        if made is None:
            this.dropped |= dict.fromkeys(
                used, "with it the average is not finite: its numbers are too large (max_norm)"
            )
            used = {}
        _tell(server_round, this.dropped)
        metrics = self._mean(self.train_metrics_aggr_fn, list(used.values()))
        metrics["fedrot-replies-used"], metrics["fedrot-replies-dropped"] = len(used), len(this.dropped)
        if made is None:
            return None, metrics
        self._good += 1
        for name, value in self._errors(watch, made).items():
            metrics[name] = value
        return write_state(made, this.form), metrics

    def _serve(self, broadcast: Broadcast, reduced: Reduced) -> Adapter | None:
        """What the method makes of a round; None, and nothing is kept of it, where that is not finite."""
        rng = generator("flower", broadcast.round, "server")
        state = self.method.server(ServerState(broadcast, self._memory), reduced, rng)
        try:
            check_finite(state.broadcast.adapter)
        except AdapterError:
            return None
        self._memory = state.memory
        return state.broadcast.adapter

    def _errors(self, watch: Watch | None, made: Adapter) -> dict[str, float | int]:
        """The round's errors by the names of the metrics."""
        errors = None if watch is None else watch.result((made,))
        if watch is not None and watch.problem is not None:
            _LOG.warning("FedRotStrategy: the round's errors are left out: %s", watch.problem)
        if errors is None:
            return {}
        totals = errors.totals()
        unknown = ("before",) if self.align == "client" else ()  # the frames before alignment are not known here
        shares = {key.removesuffix("_relative"): x for key, x in totals.items() if key.endswith("_relative")}
        found: dict[str, float | int] = {f"fedrot-error-{key}": x for key, x in shares.items() if key not in unknown}
        found["fedrot-error-estimated"] = int(totals["estimated"])
        return found | ({"fedrot-rho": totals["rho"]} if "rho" in totals else {})

    def _take_in(self, reply: Message, broadcast: Broadcast) -> tuple[Upload, float]:
        """A reply as the method takes it, and its weight; raises with the reason where it cannot be used."""
        content = content_of(reply)
        weight = weight_of(content, self.weighted_by_key)
        records = list(content.array_records.values())
        if len(records) != 1:
            raise RejectedUpload(f"the reply must hold one ArrayRecord, it holds {len(records)}")
        if self._turns and ALIGNED in content:
            raise RejectedUpload(
                "align_mod has turned it at the client: give FedRotStrategy align='client', or take align_mod away"
            )
        scales = {name: pair.scale for name, pair in broadcast.adapter.layers.items()}
        node = str(reply.metadata.src_node_id)
        upload = Upload(node, read_state(records[0], "the reply", head=True, scales=scales), held=0, used=0)
        check_upload(upload, broadcast.adapter, self._checks, reports=False)
        if not self._turns:
            return upload, weight
        rng = generator("flower", broadcast.round, "client", node)
        result = self.method.client(upload.adapter, broadcast, Seat(node), rng)
        check_finite(result.adapter)
        return replace(upload, adapter=result.adapter, rotation=result.rotation), weight

    def _read(self, arrays: ArrayRecord) -> Adapter:
        """The arrays to send as an adapter with its scales."""
        adapter = read_state(arrays, "FedRotStrategy: the arrays to send", head=True)
        check_finite(adapter)
        for name, tensor in adapter.tensors():
            if tensor.dtype == torch.float64:
                raise AdapterError(f"FedRotStrategy: {name} is float64; send float32, float16 or bfloat16")
        if self._config is None:
            return adapter
        layers = {}
        for name, pair in adapter.layers.items():
            rank, scale = rank_and_scale(self._config, name)
            if pair.rank != rank:
                raise AdapterError(f"FedRotStrategy: {name} has rank {pair.rank}, lora_config gives it rank {rank}")
            layers[name] = replace(pair, scale=scale)
        return replace(adapter, layers=layers)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg's; nothing, with a warning, where too few nodes are there."""
        if self.fraction_evaluate == 0.0:
            return []
        if missing := self._missing(grid, self.min_evaluate_nodes):
            _LOG.warning("round %d is not evaluated: %s", server_round, missing)
            return []
        return super().configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The metrics of the usable replies; None where there is none."""
        used, dropped = [], {}
        for node, reply in _by_node(replies):
            try:
                content = content_of(reply)
                weight_of(content, self.weighted_by_key)
            except RejectedUpload as problem:
                dropped[node] = _line(problem)
                continue
            used.append(content)
        _tell(server_round, dropped, "evaluation of ")
        return self._mean(self.evaluate_metrics_aggr_fn, used) if used else None

    def _mean(self, combine: Callable[[list[RecordDict], str], MetricRecord], used: list[RecordDict]) -> MetricRecord:
        """The replies' metrics as `combine` has them: a client's numbers that it cannot take must not end the run."""
        try:
            return MetricRecord(dict(combine(used, self.weighted_by_key))) if used else MetricRecord()
        except Exception as problem:
            _LOG.warning("the clients' metrics are left out: %s: %s", type(problem).__name__, _line(problem))
            return MetricRecord()

    def _missing(self, grid: Grid, least: int) -> str | None:
        """Wait for the nodes; what is wrong where there are too few in the end."""
        least, end = max(least, self.min_available_nodes), time.monotonic() + self.patience
        while (there := len(list(grid.get_node_ids()))) < least:
            if time.monotonic() >= end:
                return f"{there} nodes are connected after {self.patience:g} s, {least} are needed"
            time.sleep(min(1.0, self.patience))
        return None


def served(name: str) -> type[Method]:
    """The method of this name; `RecipeError` with the choices where clients of any app are not enough for it."""
    kind = get_method(name)
    if reason := _beyond(kind):
        offered = choices(n for n, m in methods().items() if not _beyond(m))
        raise RecipeError(f"FedRotStrategy: method {name!r} {reason}; choose {offered}")
    return kind


def _beyond(kind: type[Method]) -> str | None:
    """What the method asks of clients that clients of any app do not do."""
    has = kind.capabilities
    if has.control:
        return "is a control of an experiment"
    if has.pooled:
        return "wants all data in one place"
    if has.second_phase:
        return "asks clients a second question in every round"
    if has.changes_base:
        return "changes the base model, which clients would have to follow"
    if has.client_state or has.personal or kind.begin is not Method.begin:
        return "needs clients that start from factors of their own"
    if any(part(kind(), number) != ALL_PARTS for number in (0, 1) for part in (kind.trainable, kind.uploads)):
        return "needs clients that train one factor and leave the other as it is"
    return None


def _config_of(lora_config: Any) -> Mapping[str, Any] | None:
    if lora_config is None:
        return None
    config = lora_config.to_dict() if hasattr(lora_config, "to_dict") else lora_config
    if not isinstance(config, Mapping):
        raise RecipeError(f"FedRotStrategy: lora_config must be PEFT's LoraConfig or a mapping, got {lora_config!r}")
    check_config(config, "FedRotStrategy: lora_config")
    return config


def _by_node(replies: Iterable[Message]) -> list[tuple[int, Message]]:
    return sorted(((reply.metadata.src_node_id, reply) for reply in replies), key=lambda pair: pair[0])


def _line(problem: Exception) -> str:
    """What a client sent can be in it: one line, and no long one."""
    return " ".join(str(problem).split())[:300]


def _tell(server_round: int, dropped: Mapping[int, str], what: str = "") -> None:
    for node, reason in dropped.items():
        _LOG.warning("%sround %d: the reply of node %d is dropped: %s", what, server_round, node, reason)
