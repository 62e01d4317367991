"""Replies out of a SuperLink, which hands on whatever a client sent: a bad one costs its own client alone.

Flower's own grid holds all that it is given in memory, loses the other replies of a call where one cannot be read, and
waits up to two hours for one whose parts do not come. Here each reply is taken by itself: lengths are known before
bytes are read, and what is still on its way is left there until it is asked for again.
"""

import contextlib
import json
import math
import time
from collections import Counter
from dataclasses import dataclass

import httpx
from flwr.app import Array, Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import get_object_body, iterate_object_tree
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content as head_of
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.runtime import RuntimeHttpClient

from fedrot.running.network.messages import LONGEST_HEADER

_FRAME = 1 << 20  # bytes that Flower's own objects around header and payload may take, of each kind
# Flower cuts arrays into objects of five times this size; beside them a reply has five.
_PIECE, _OTHERS = 1 << 20, 64
_BOUNDED = ("/pull-messages", "/pull-object")  # calls whose answers are as long as a client wants them


class _Refused(Exception):
    """A reply that is not taken; the text is the reason."""


@dataclass(frozen=True)
class _Coming:
    """A reply that Flower has said to be there, which it says once, whether its objects are there or not."""

    number: str  # Flower's, of the reply
    objects: list[str]  # what it consists of, in the order in which they are asked for


class Replies:
    """The replies to the messages of a run of Flower's.

    Args:
        client: reaches the SuperLink; the length of what it answers is looked at from now on.
        node: the server's own.
        run: the run.
    """

    def __init__(self, client: RuntimeHttpClient, node: Node, run: int) -> None:
        self._client, self._node, self._run = client, node, run
        self._object = make_pull_object_fn_protobuf(client.PullObject, node, run)
        self._coming: dict[str, _Coming] = {}  # by the message that it is a reply to
        self._room = math.inf  # bytes that the next answer may have
        client._client.event_hooks["response"].append(self._check_length)

    def take(self, number: str, most: int) -> Message | None:
        """The reply to this message; None: it is not there yet, or not all of it. A reply that cannot be one of
        fedrot's with a payload of `most` bytes at most is an error in its place, which says why.

        Raises httpx's errors, and may be called again then.
        """
        self._room = most + LONGEST_HEADER + _FRAME
        try:
            coming = self._coming.get(number) or self._given(number)
            if coming is None:
                return None
            reply = _inflated(coming.number, self._contents(coming, most), most)
        except httpx.HTTPError:
            raise
        except ObjectUnavailableError:
            return None
        except ObjectPullError:  # Flower gave up waiting for it
            reply = self._error(ErrorCode.MESSAGE_UNAVAILABLE, "the reply was not sent to its end")
        except _Refused as problem:
            reply = self._error(ErrorCode.UNKNOWN, str(problem))
        except Exception as problem:  # whatever Flower's reading of a reply ends in
            reply = self._error(ErrorCode.UNKNOWN, f"the reply cannot be read ({type(problem).__name__}: {problem})")
        self._forget(number)
        # What the reply says of itself is the client's word; what it was asked for is this server's.
        reply.metadata.__dict__["_reply_to_message_id"] = number
        return reply

    def _given(self, number: str) -> _Coming | None:
        """What Flower has of the reply."""
        found = self._client.PullMessages(PullAppMessagesRequest(message_ids=[number]))
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            if message.metadata.reply_to_message_id == number:
                # The message itself was sent last: where it is not there, the others need not be asked for.
                objects = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))[::-1]
                self._coming[number] = _Coming(message.metadata.message_id, objects)
                return self._coming[number]
        return None

    def _contents(self, coming: _Coming, most: int) -> dict[str, bytes]:
        """The objects by their number. Raises `ObjectUnavailableError` where one is not there, which is the first to be
        asked for then, and `_Refused` where they are too many or too large.
        """
        if len(coming.objects) > _pieces(most):
            raise _Refused(f"the reply has {len(coming.objects)} parts, more than the {_pieces(most)} allowed")
        allowed = {"ArrayChunk": most, "ConfigRecord": LONGEST_HEADER + _FRAME}
        contents: dict[str, bytes] = {}
        sizes: Counter[str] = Counter()
        for number in list(coming.objects):
            try:
                contents[number] = self._object(number)
            except ObjectUnavailableError:
                coming.objects.remove(number)
                coming.objects.insert(0, number)
                raise
            kind, size = head_of(contents[number])[0], len(contents[number])
            self._room -= size
            sizes[kind] += size
            if sizes[kind] > (bound := allowed.get(kind, _FRAME)):
                raise _Refused(f"the reply has {sizes[kind]} bytes of {kind[:20]}, more than the {bound} allowed")
        return contents

    def _check_length(self, response: httpx.Response) -> None:
        """Raise `_Refused` before an answer is read that is longer than it may be, or does not say how long it is."""
        if response.is_success and response.request.url.path.endswith(_BOUNDED):
            length = response.headers.get("content-length")
            if length is None or int(length) > self._room + _FRAME:
                raise _Refused(f"the reply has a part of {length} bytes, more than are allowed")

    def _forget(self, number: str) -> None:
        """Flower need not keep it. What it keeps all the same goes with the run."""
        coming = self._coming.pop(number, None)
        if coming is not None:
            with contextlib.suppress(httpx.HTTPError):
                self._client.ConfirmMessageReceived(
                    ConfirmMessageReceivedRequest(node=self._node, run_id=self._run, message_object_id=coming.number)
                )

    def _error(self, code: int, reason: str) -> Message:
        here = self._node.node_id
        about = Metadata(self._run, "", here, here, "", "", time.time(), 0.0, SYSTEM_MESSAGE_TYPE)
        return make_message(about, error=Error(code, reason))


def _pieces(most: int) -> int:
    """How many objects a reply with a payload of so many bytes may be cut into."""
    return _OTHERS + most // _PIECE


def _inflated(number: str, contents: dict[str, bytes], most: int) -> Message:
    """The message that the objects are. An array may name a piece more than once, and a piece be in more than one
    array, so what they would take in memory is added up before. Raises `_Refused`, and whatever Flower does.
    """
    total = 0
    for content in contents.values():
        kind, children, _ = head_of(content)
        if kind == Array.__qualname__:
            named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            if len(named) > _pieces(most):
                raise _Refused(f"the reply has an array of {len(named)} parts, more than the {_pieces(most)} allowed")
            total += sum(len(contents[children[place]]) for place in named)
    if total > most:
        raise _Refused(f"the reply has arrays of {total} bytes, more than the {most} allowed")
    message = inflate_object_from_contents(number, contents)
    if not isinstance(message, Message):
        raise _Refused("the reply is not a message")
    return message
