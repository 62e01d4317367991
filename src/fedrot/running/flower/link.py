"""The server's side of Flower: a SuperLink, and a grid over it that outlives what happens to it.

Sites are Flower's nodes, known by their registered keys. The grid belongs to a run of Flower's that fedrot starts and
serves itself: no other program is started for it, and no app is ever run.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedrot import __version__
from fedrot.core.errors import RunError
from fedrot.running.flower.control import Showing
from fedrot.running.flower.pull import Replies

Result = TypeVar("Result")

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_BEAT = 10.0  # seconds between signs of life
_PAUSE = 1.0  # seconds until something is tried again
_STARTING = 60.0  # seconds that Flower may take to give a new run's task
_SERVER_ERRORS = 5  # answers of 5xx in a row after which the run is given up for a new one
# A reply's payload has at most _TIMES the bytes of the largest request, and _MORE. That request is a broadcast; an
# upload is as large, or has the rotations of its factors too, which are smaller. What else comes back is small.
_TIMES, _MORE = 2, 8 << 20

_log = logging.getLogger("fedrot")

# Flower wants an app for each run. Nothing of this one is ever run: server and sites bring their own code.
_APP = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "fedrot-rounds"
version = "{__version__}"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedrot"
[tool.flwr.app.components]
serverapp = "fedrot.running.flower:server"
clientapp = "fedrot.running.flower:client"
[tool.flwr.app.config]
"""


class _NotYet(RunError):
    """What may come to be when it is tried again."""


@dataclass(frozen=True)
class Link:
    """How a SuperLink is reached by its own server."""

    address: str  # host:port
    certificate: bytes  # of the authority, PEM
    secret: bytes  # what shows that a task is asked for by this server
    keys: Mapping[str, bytes]  # the clients' public keys, by name

    def open(self) -> "OpenRun":
        """Register the clients and begin a run of Flower's. Raises httpx's errors, and `RunError` where it never
        comes to be.
        """
        self._check_closed()
        control = self._control(Showing(self.secret))
        with control, executor_client(self.address, self.certificate, self.secret) as executor:
            self._register(control)
            content, _ = build_fab_from_files(
                {"pyproject.toml": _APP.encode(), "fedrot_rounds.py": b"", "LICENSE": b""}
            )
            app = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
            number = control.StartRun(StartRunRequest(fab=app)).run_id
            end = time.monotonic() + _STARTING
            while time.monotonic() < end:
                taken = executor.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
                # Tasks of other runs, of whoever started them, are taken and left.
                if taken.token and taken.task.run_id == number:
                    return OpenRun(self, taken.token)
                time.sleep(0.2)
        raise _NotYet(f"{self.address}: the SuperLink gave no task for its run within {_STARTING:g} s; see its log")

    def _control(self, *interceptors: ProtobufClientInterceptor) -> ControlHttpClient:
        guards = [_version("flwr CLI"), *interceptors]
        return ControlHttpClient.from_server_address(self.address, False, self.certificate, guards)

    def _check_closed(self) -> None:
        """Raise `RunError` where whoever reaches the SuperLink has its control interface."""
        with self._control() as stranger:
            try:
                stranger.ListNodes(ListNodesRequest())
            except httpx.HTTPStatusError as problem:
                if problem.response.status_code == httpx.codes.UNAUTHORIZED:
                    return
                raise
        raise RunError(f"{self.address}: the SuperLink's control interface is open to all: flwr 1.41 is needed")

    def _register(self, control: ControlHttpClient) -> None:
        """Have Flower know the clients' keys. Raises `RunError` where it knows one no more: it takes a key once."""
        for name, key in self.keys.items():
            try:
                control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
            except httpx.HTTPStatusError as problem:
                if problem.response.status_code >= 500:
                    raise
                # Registered before, as a rule: what Flower knows of it shows below.
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
        known = {node.public_key for node in nodes if node.status != NodeStatus.UNREGISTERED}
        if missing := sorted(name for name, key in self.keys.items() if key not in known):
            raise RunError(
                f"{self.address}: the SuperLink lets {', '.join(missing)} in no more; remove flower/state.db* from the "
                "run folder, and go on with the same command and --resume"
            )


class OpenRun(HttpGrid):
    """A grid of one run, whose errors come through at once, with a thread that says that this server lives."""

    def __init__(self, link: Link, token: str) -> None:
        super().__init__(link.address, root_certificates=link.certificate, token=token)
        self._client = RuntimeHttpClient.from_server_address(
            server_address=link.address,
            insecure=False,
            root_certificates=link.certificate,
            interceptors=[self._tracing, _version("flwr-serverapp"), RuntimeTokenHttpInterceptor(token=token)],
        )
        found = self._client.PullTaskInput(PullTaskInputRequest())
        # Flower's messages are made from this.
        TaskIdentity.task_id, TaskIdentity.run_id = found.task_id, found.run.run_id
        TaskIdentity.node_id = found.context.node_id
        self.set_run(run_from_proto(found.run))
        self._replies = Replies(self._client, self.node, found.run.run_id)
        self.most = _MORE  # bytes of a reply's payload
        self.lost = threading.Event()
        self._closing = threading.Event()
        signs = (self._runtime_client, self._closing, self.lost)
        threading.Thread(target=beat, args=signs, name="fedrot-beat", daemon=True).start()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there, each taken by itself; what cannot be used is an error that says why."""
        found = (self._replies.take(number, self.most) for number in message_ids)
        return [reply for reply in found if reply is not None]

    def close(self) -> None:
        """Say no more that this server lives."""
        self._closing.set()
        super().close()


def beat(client: RuntimeHttpClient, closing: threading.Event, lost: threading.Event) -> None:
    """Say that a task is worked on, until told to stop; `lost` is set where it is nobody's any more."""
    while not closing.wait(_BEAT):
        try:
            if not client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                lost.set()
        except httpx.HTTPStatusError as problem:
            if problem.response.status_code < 500:
                lost.set()
        except (httpx.HTTPError, RuntimeError):  # the link is being started again, or this client was closed
            continue


def executor_client(address: str, certificate: bytes | None, secret: bytes) -> RuntimeHttpClient:
    """A client that may take tasks from a SuperLink, or without a certificate from a SuperNode of this machine."""
    guard = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE)
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=certificate is None,
        root_certificates=certificate,
        interceptors=[_version("SuperExec"), guard],
    )


def _version(component: str) -> RuntimeVersionHttpInterceptor:
    return RuntimeVersionHttpInterceptor(component_name=component)


@dataclass
class _Sent:
    """A message whose reply is not there yet, so that it can be sent once more in another run of Flower's."""

    content: RecordDict
    node: int
    kind: str
    ttl: float
    group: str
    until: float  # monotonic seconds: nobody waits for its reply after that
    number: str = ""  # Flower's, of the run that is open

    def message(self) -> Message:
        return Message(self.content, self.node, self.kind, ttl=self.ttl, group_id=self.group)


class SteadyGrid:
    """What `GridPost` needs of a grid, which goes on when the SuperLink was ended and is there again, if need be in
    another run of Flower's.

    Args:
        link: the SuperLink.
        patience: seconds without an answer of the SuperLink's after which `RunError` is raised.
    """

    def __init__(self, link: Link, patience: float = 300.0) -> None:
        self._link, self._patience = link, patience
        self._open: OpenRun | None = None
        self._sent: dict[str, _Sent] = {}  # by the number that was given out
        self._largest = 0  # bytes of a request's arrays
        self._errors = 0

    def get_nodes(self) -> list[NodeInfo]:
        """The connected nodes."""
        return self._steady(lambda grid: list(grid.get_nodes()))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; the numbers that stand for them here."""
        now = time.monotonic()
        self._sent = {number: one for number, one in self._sent.items() if one.until > now}
        about = [(message.content, message.metadata) for message in messages]
        sent = [_Sent(content, m.dst_node_id, m.message_type, m.ttl, m.group_id, now + m.ttl) for content, m in about]
        self._largest = max(self._largest, *(_bytes_of(one.content) for one in sent), 0)
        numbers = self._steady(lambda grid: list(grid.push_messages([one.message() for one in sent])))
        if len(numbers) != len(sent):
            raise RunError(f"{self._link.address}: the SuperLink does not take messages of this size (status 413)")
        for one, number in zip(sent, numbers, strict=True):
            one.number = str(number)
        found = [one.number for one in sent]
        self._sent |= dict(zip(found, sent, strict=True))
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; each is given once.

        They are asked for one by one, so none that was taken is lost with the SuperLink.
        """
        found = []
        for number in message_ids:
            reply = self._steady(partial(self._pull, self._sent[number])) if number in self._sent else None
            if reply is not None:
                del self._sent[number]
                reply.metadata.__dict__["_reply_to_message_id"] = number
                found.append(reply)
        return found

    def _pull(self, sent: _Sent, grid: OpenRun) -> Message | None:
        grid.most = _TIMES * self._largest + _MORE
        return next(iter(grid.pull_messages([sent.number])), None)

    def close(self) -> None:
        """The run is over."""
        if self._open is not None:
            self._open.close()

    def _steady(self, call: Callable[[OpenRun], Result]) -> Result:
        """What a call gives, however often the SuperLink has to be asked for it."""
        end = time.monotonic() + self._patience
        while True:
            try:
                grid = self._ensure_open()
                found = call(grid)
                self._errors = 0
                return found
            except (httpx.HTTPError, _NotYet) as problem:
                self._note(problem)
                if time.monotonic() > end:
                    raise RunError(
                        f"{self._link.address}: the SuperLink gave no answer for {self._patience:g} s ({problem}); go "
                        "on with the same command and --resume"
                    ) from None
            time.sleep(_PAUSE)

    def _note(self, problem: Exception) -> None:
        """Whether the run that is open can go on after this."""
        _log.info("the SuperLink: %s", problem)
        if isinstance(problem, httpx.HTTPStatusError):
            self._errors += 1
            if problem.response.status_code < 500 or self._errors >= _SERVER_ERRORS:
                self._abandon()

    def _abandon(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open, self._errors = None, 0

    def _ensure_open(self) -> OpenRun:
        if self._open is not None and self._open.lost.is_set():
            _log.info("the SuperLink ended Flower's run; another one is begun")
            self._abandon()
        if self._open is None:
            opened, waiting = self._link.open(), list(self._sent.values())
            try:
                numbers = list(opened.push_messages([one.message() for one in waiting])) if waiting else []
            except BaseException:  # a run that does not know what is waited for is of no use
                opened.close()
                raise
            for one, number in zip(waiting, numbers, strict=True):
                one.number = str(number)
            self._open = opened
        return self._open


def _bytes_of(content: RecordDict) -> int:
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())
