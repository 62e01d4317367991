"""A message that never comes whole does not keep a site from the next one."""

import threading

import httpx
import pytest
from flwr.app import Context, RecordDict
from flwr.common.serde import context_to_proto, run_to_proto
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import Message, ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import (
    AcquireTaskResponse,
    PullAppMessagesResponse,
    PullTaskInputResponse,
    SendTaskHeartbeatResponse,
)
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.run import Run

from fedrot.running.flower import carrier
from fedrot.running.network.messages import Message as FedrotMessage


def test_a_message_of_which_nothing_comes_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken, ending = 0, threading.Event()

    def supernode(request: httpx.Request) -> httpx.Response:
        nonlocal taken
        call = request.url.path.rsplit("/", 1)[1]
        if call == "acquire-task":
            taken += 1
            if taken == 2:
                ending.set()  # it goes on to the next one
        answers = {
            "acquire-task": AcquireTaskResponse(token="" if taken == 2 else "a token"),
            "send-task-heartbeat": SendTaskHeartbeatResponse(success=True),
            "pull-task-input": PullTaskInputResponse(
                context=context_to_proto(Context(1, 2, {}, RecordDict(), {})),
                run=run_to_proto(Run.create_empty(1)),
                fab=Fab(),
            ),
            "pull-messages": PullAppMessagesResponse(
                messages_list=[Message()], message_object_trees=[ObjectTree(object_id="0" * 64)]
            ),
            # Flower knows of it, and has nothing of it.
            "pull-object": PullObjectResponse(object_found=True, object_available=False),
        }
        return httpx.Response(200, content=answers[call].SerializeToString())

    def reach(cls: type, **given: object) -> object:
        client = cls("http://here", interceptors=given["interceptors"])
        client._client = httpx.Client(transport=httpx.MockTransport(supernode))
        return client

    monkeypatch.setattr(ProtobufClient, "from_server_address", classmethod(reach))
    monkeypatch.setattr(carrier, "_STALLED", 0.0)
    monkeypatch.setattr(carrier, "_LOOK", 0.01)
    site = threading.Thread(
        target=carrier.carry, args=("here:1", b"s", lambda request: FedrotMessage.of(), ending), daemon=True
    )
    site.start()
    assert ending.wait(60.0)
    site.join(10.0)
    assert "nothing of the message came for 0 s" in caplog.text
