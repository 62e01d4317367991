"""fedrot's messages as Flower's records: a header of JSON and one array of bytes, since Flower costs by the array."""

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict
from torch import Tensor

from fedrot.running.network.messages import Message, MessageError, one_line

_HEADER, _PAYLOAD, _NAME = "fedrot.header", "fedrot.payload", "bytes"
# The bytes themselves. Flower's own form is numpy's file format, whose header may claim any size.
_RAW = "fedrot.raw"


def to_records(message: Message, payload: ArrayRecord | None = None) -> RecordDict:
    """The records that hold a message; `payload` is that of its payload, where it was made already."""
    header = ConfigRecord({_NAME: message.header_bytes()})
    return RecordDict({_HEADER: header, _PAYLOAD: payload_record(message.payload) if payload is None else payload})


def payload_record(payload: Tensor) -> ArrayRecord:  # of (n,) uint8
    """A payload's record, of which many messages may be made: Flower knows what it holds by its hash."""
    return ArrayRecord({_NAME: Array("uint8", tuple(payload.shape), _RAW, payload.numpy().tobytes())})


def from_records(content: RecordDict) -> Message:
    """The message in records. Raises `MessageError` where there is none; nothing is unpickled."""
    try:
        header, array = content[_HEADER][_NAME], content[_PAYLOAD][_NAME]
    except (KeyError, TypeError):
        raise MessageError("the message holds no records of fedrot's") from None
    if not isinstance(header, bytes) or not isinstance(array, Array) or array.stype != _RAW:
        raise MessageError("the message's records are not of the kinds that fedrot sends")
    return Message.from_parts(header, torch.from_numpy(np.frombuffer(array.data, dtype=np.uint8).copy()))


def said(error: Error) -> str:
    """Why there is no reply, in Flower's words or in a client's own."""
    return f"Flower says: {one_line(str(error.reason or 'no reason was given'))[:300]} (code {error.code})"
