"""A simulation whose clients are the virtual nodes of Flower's simulation engine, on Ray (the extra `ray`): on several
GPUs, or on several machines.

Ray's processes are one program's, on machines that trust each other: Flower and Ray pickle what goes between them.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue
from typing import Literal

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp

from fedrot.core.errors import RecipeError, RunError
from fedrot.learning.partition import Partition
from fedrot.running.flower.post import GridPost, PushPull
from fedrot.running.flower.seat import client_app
from fedrot.running.folder import RunFolder
from fedrot.running.network.engine import Expected, Network
from fedrot.running.network.journal import FileJournal
from fedrot.running.network.messages import Message, count_of
from fedrot.running.network.opening import check_asked
from fedrot.running.network.site import ANSWERS, Seat, kind_of, replied
from fedrot.running.prepare import first_adapter, prepare
from fedrot.running.recipe import Recipe
from fedrot.running.rounds import Watcher
from fedrot.running.run import Stage, divided_stage, run
from fedrot.running.simulation import personal

_WHO = "who"  # what a node is asked first: the number of its client
_PARTITION = "partition-id"  # Flower's name for that number
_LOOK = 0.1  # seconds between two looks for replies

# An app and how many nodes run it -> where they are.
Nodes = Callable[[ClientApp, int], AbstractContextManager[PushPull]]


@dataclass(frozen=True)
class Share:
    """What Ray keeps for a client that trains."""

    cpus: int = 1
    gpus: float = 0.0  # 0.5: two clients share one

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What clients train on."""
        return "cuda" if self.gpus else "cpu"


def run_on_ray(recipe: Recipe, out: Path, watcher: Watcher, resume: bool, share: Share) -> RunFolder:
    """`run.run` with the clients on Ray: a cluster that RAY_ADDRESS names, or else one of this machine.

    Raises `RunError` where Ray is not installed or ends, beside what `run` raises.
    """
    if find_spec("ray") is None:
        raise RunError("Ray is not installed; run: pip install 'fedrot[ray]'")
    with ExitStack() as stack:
        return run(recipe, out, watcher, resume, on_nodes(stack, lambda app, count: on_ray(app, count, share), share))


def on_nodes(stack: ExitStack, nodes: Nodes, share: Share) -> Callable[[Recipe, RunFolder], Stage]:
    """For `run`: a node for each client of the recipe's partition, which `stack` ends."""

    def open_stage(recipe: Recipe, folder: RunFolder) -> Stage:
        _check(recipe, share)
        compute = replace(recipe.compute, device="cpu", workers=1, stack=1, threads=share.cpus)
        ready = prepare(replace(recipe, compute=compute))  # nothing is trained in this process
        there = replace(ready.recipe, compute=replace(ready.recipe.compute, device=share.device))
        clients = sorted(ready.partition.clients)
        kept = folder.path.absolute() / "sites"
        grid = stack.enter_context(nodes(virtual_sites(there, clients, kept), len(clients)))
        expected = Expected(first_adapter(recipe, ready.model), ready.model.fingerprint(), ready.dataset.labels)
        post = GridPost(grid, _names(grid, clients), pause=_LOOK)
        engine = Network(there, expected, post, clients, journal=FileJournal(folder.path))
        how = f"{len(clients)} virtual nodes, {share.cpus} CPU and {share.gpus:g} GPU for each that trains, one by one"
        return divided_stage(replace(ready, recipe=there), engine, how)

    return open_stage


def _check(recipe: Recipe, share: Share) -> None:
    """Refuse what virtual nodes cannot do, with the reason. Raises `RecipeError`."""
    check_asked(recipe, "on virtual nodes")
    compute = recipe.compute
    for refused, key, why in (
        (
            recipe.method.capabilities.second_phase,
            "method.name",
            f"{recipe.method.name} asks twice in a round, and the second time another process may answer",
        ),
        (
            recipe.secure.aggregation,
            "secure.aggregation",
            "its stages would be answered by different processes; fedrot run has it in one process",
        ),
        (
            recipe.federation.buffer is not None,
            "federation.buffer",
            "who comes first is up to Ray; fedrot run has it on simulated time",
        ),
        ((compute.workers or 1) != 1, "compute.workers", "Ray decides how many train at once; leave it null"),
        ((compute.stack or 1) != 1, "compute.stack", "a node trains one client at a time; leave it null"),
        ((compute.threads or share.cpus) != share.cpus, "compute.threads", "--ray.cpus says it; leave it null"),
        (
            compute.device not in (None, share.device),
            "compute.device",
            "--ray.gpus says it; leave it null",
        ),
        (
            bool(share.gpus) and recipe.local.precision == "auto",
            "local.precision",
            "this process does not know the nodes' GPUs; set it to fp32 or bf16",
        ),
    ):
        if refused:
            raise RecipeError(f"{key}: on virtual nodes, {why}")


def virtual_sites(recipe: Recipe, clients: Sequence[str], folder: Path) -> ClientApp:
    """The app of a node that answers for the client whose number Flower gives it. What clients keep is in `folder`,
    on a disk that all machines share; the recipe's paths are from this process's folder there too.
    """
    values, here = json.dumps(recipe.to_dict()), str(Path.cwd())
    app = ClientApp()

    def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
        number = int(context.node_config[_PARTITION])

        def handle(request: Message) -> Message:
            if request.header.get("kind") == _WHO:
                return Message.of(partition=number)
            return replied(clients[number], lambda: _process(values, here, str(folder)).answer(number, request))

        return client_app(handle)(message, context)

    for register in (app.train, app.evaluate, app.query):
        register()(answer)
    return app


class _Process:
    """What one process of the simulation holds: model, data, and the seats of the clients that it has answered for."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._ready, self._folder = prepare(recipe), folder
        self._clients = sorted(self._ready.partition.clients)
        self._form = first_adapter(self._ready.recipe, self._ready.model)
        self._base = self._ready.model.fingerprint()
        self._seats: dict[int, Seat] = {}

    def answer(self, number: int, request: Message) -> Message:
        """The reply of the client of this number. It need not have joined here: every process has the recipe."""
        if number not in self._seats:
            self._seats[number] = self._seat(number)
        seat, kind = self._seats[number], kind_of(request)
        if kind == "join":
            return seat.introduction(self._ready.dataset.labels)
        if kind == "finish" and not personal(self._ready.recipe):  # the run folder has the one adapter
            return Message.of(round=count_of(request.header, "round"))
        return ANSWERS[kind](seat, request)

    def _seat(self, number: int) -> Seat:
        name, whole = self._clients[number], self._ready.partition
        own = {split: {name: parts[name]} for split, parts in whole.indices.items() if name in parts}
        alone = replace(self._ready, partition=Partition((name,), own, whole.strata))
        return Seat(("run", alone.recipe), alone, self._folder / f"{number:03d}", self._form, self._base)


@lru_cache(maxsize=1)
def _process(values: str, here: str, folder: str) -> _Process:
    """What is loaded for a process's first message."""
    os.chdir(here)
    return _Process(Recipe.from_values(json.loads(values)), Path(folder))


def _names(grid: PushPull, clients: Sequence[str]) -> dict[bytes, str]:
    """Each client's name by the key of the node that answers for it."""
    post, found = GridPost(grid, None, pause=_LOOK), {}
    replies = dict(post.ask(dict.fromkeys(post.clients(), Message.of(kind=_WHO)), None))
    for node in grid.get_nodes():
        reply = replies[node.name or str(node.node_id)]
        if not isinstance(reply, Message):
            raise RunError(f"a node of the simulation cannot answer: {reply}")
        found[node.public_key] = clients[count_of(reply.header, "partition")]
    return found


@contextmanager
def on_ray(app: ClientApp, count: int, share: Share) -> Iterator[PushPull]:
    """So many nodes of Flower's simulation engine. What is asked of them raises `RunError` once that has ended."""
    from flwr.simulation import run_simulation

    given: Queue[Grid] = Queue()
    over = threading.Event()
    problems: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        given.put(grid)
        over.wait()

    def simulate() -> None:
        config = {"client_resources": {"num_cpus": share.cpus, "num_gpus": share.gpus}}
        try:
            run_simulation(server, app, count, backend_config=config)  # type: ignore[arg-type]
        except BaseException as problem:
            problems.append(problem)

    engine = threading.Thread(target=simulate, name="flower-simulation")

    def check() -> None:
        if not engine.is_alive():
            raise RunError(f"Flower's simulation engine ended: {_reason(problems)}")

    engine.start()
    try:
        grid = _Watched(_first(given, check), check)
        while len(list(grid.get_nodes())) < count:
            over.wait(_LOOK)
        yield grid
    finally:
        over.set()
        engine.join()


def _first(given: Queue[Grid], check: Callable[[], None]) -> Grid:
    while True:
        try:
            return given.get(timeout=1.0)
        except Empty:
            check()


def _reason(problems: Sequence[BaseException]) -> str:
    """What it began with, in a line."""
    if not problems:
        return "it does not say why"
    first = problems[0]
    while first.__cause__ is not None:
        first = first.__cause__
    return f"{type(first).__name__}: {' '.join(str(first).split())}"[:300]


class _Watched:
    """What `GridPost` needs of a grid whose nodes may end while replies are waited for."""

    def __init__(self, grid: Grid, check: Callable[[], None]) -> None:
        self._grid, self._check = grid, check

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes. Raises what `check` raises."""
        self._check()
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Send messages; their numbers."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        """The replies that are there."""
        return self._grid.pull_messages(message_ids)
