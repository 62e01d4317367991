"""The site's side of Flower: what a SuperNode receives goes to the site's worker, and its reply back.

Whatever app a server names, nothing of it is run here: a message is answered by fedrot, or refused.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from flwr.app import Context, Error
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedrot.running.flower.link import beat, executor_client
from fedrot.running.flower.seat import Handle, client_app
from fedrot.running.network.channel import WorkerError, ask
from fedrot.running.network.messages import Message

_LOOK = 0.3  # seconds between two looks for a message
_AGAIN = 2.0  # seconds until a worker that was started again is asked once more
_STALLED = 180.0  # seconds without a part of a message after which it is given up

_log = logging.getLogger("fedrot")


def carry(address: str, secret: bytes, handle: Handle, ending: threading.Event) -> None:
    """Answer what the SuperNode at `address` (host:port, on this machine) receives, until told to end."""
    app, reached = client_app(handle), True
    while not ending.is_set():
        try:
            with executor_client(address, None, secret) as executor:
                while not ending.wait(_LOOK):
                    taken = executor.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
                    reached = True
                    if taken.token:
                        _answer(address, taken.token, app)
        except httpx.HTTPError as problem:  # it is being started, or started again
            if reached:
                _log.info("the SuperNode cannot be reached (%s)", problem)
            reached = False
            ending.wait(1.0)
        except Exception:
            # Whatever a message did to this thread, the next one is answered.
            _log.exception("a message could not be carried")


class _Taking(RuntimeHttpClient):
    """Waits for a message that the SuperNode is still receiving, as long as something comes. The SuperNode hands out a
    message whose run ended meanwhile too, of which nothing comes any more, and Flower would wait two hours for it.
    """

    _last: float | None = None  # when something came, in monotonic seconds

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        """A part of a message. Raises `ObjectPullError` where none has come for a while."""
        found = super().PullObject(request)
        if found.object_available or self._last is None:
            self._last = time.monotonic()
        elif time.monotonic() - self._last > _STALLED:
            raise ObjectPullError(request.object_id, f"nothing of the message came for {_STALLED:g} s")
        return found


def _answer(address: str, token: str, app: ClientApp) -> None:
    """One message: take it, have it answered, and give the reply to the SuperNode."""
    guards: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
        RuntimeTokenHttpInterceptor(token),
    ]
    closing, lost = threading.Event(), threading.Event()
    with _Taking.from_server_address(
        server_address=address, insecure=True, root_certificates=None, interceptors=guards
    ) as client:
        life = threading.Thread(target=beat, args=(client, closing, lost), daemon=True)
        life.start()
        try:
            message, context, _, _ = pull_task_input(client)
            push_message(client, _reply(message, context, app), context)
            push_task_output(client, context, SubStatus.COMPLETED, "")
        finally:
            closing.set()


def _reply(message: FlowerMessage, context: Context, app: ClientApp) -> FlowerMessage:
    try:
        return app(message, context)
    except Exception as problem:  # a kind of message that fedrot has no answer to
        _log.warning("a message of type %r was refused (%s)", message.metadata.message_type, problem)
        return FlowerMessage(
            Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "not a message of fedrot's"), reply_to=message
        )


def to_worker(path: Path, patience: float = 180.0) -> Callable[[Message], Message]:
    """Asks the worker at a socket; where it dies, the one that is started in its place, for so many seconds."""

    def handle(request: Message) -> Message:
        end = time.monotonic() + patience
        while True:
            try:
                return ask(path, request)
            except WorkerError as problem:
                if time.monotonic() > end:
                    raise
                _log.info("%s; it is asked again", problem)
            time.sleep(_AGAIN)

    return handle
