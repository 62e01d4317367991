"""Broadcasts and uploads as messages, and back.

Both sides know the adapter's form: names, shapes and scales do not travel, their hash does. A change of the base has a
rank that grows, so it travels as safetensors with its own form.
"""

from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.checks import METRICS, RejectedUpload
from fedrot.core.compression import decompress, payload_bytes
from fedrot.core.drift import DRIFT_KEYS
from fedrot.core.errors import AdapterError
from fedrot.core.files import tensor_bytes
from fedrot.core.methods.base import ALL_PARTS, Broadcast, Upload
from fedrot.core.packed import Layout
from fedrot.running.checkpoint import pack_adapter, unpack_adapter
from fedrot.running.client import Round, travelling_parts
from fedrot.running.network.messages import (
    Message,
    MessageError,
    Reader,
    count_of,
    numbers_of,
    of_round,
    only,
    shown,
    value_of,
)
from fedrot.running.recipe import Recipe

# What a broadcast may hold beside its adapter, in the adapter's form, in the order in which they travel.
_ROLES = ("reference", "variate")
# What an upload's header holds, and the phases whose seconds it may say.
_UPLOAD = ("round", "schema", "held", "used", "turned", "variate", "metrics", "layers", "seconds")
_PHASES = ("train", "align", "diagnose", "compress")


def broadcast_parts(recipe: Recipe) -> frozenset[str]:
    """The parts of the adapter that sites are sent. One's own head is not: it starts from the seed."""
    return ALL_PARTS if recipe.lora.head == "shared" else ALL_PARTS - {"head"}


def broadcast_message(broadcast: Broadcast, recipe: Recipe, kind: str, **header: Any) -> Message:
    """A request that carries the broadcast."""
    layout = Layout.of(broadcast.adapter, broadcast_parts(recipe))
    roles = {role: getattr(broadcast, role) for role in _ROLES if getattr(broadcast, role) is not None}
    payload = [layout.pack(adapter) for adapter in (broadcast.adapter, *roles.values())]
    base: dict[str, Any] | None = None
    if broadcast.base_delta is not None:
        tensors: dict[str, Tensor] = {}
        form = pack_adapter(broadcast.base_delta, "base", tensors)
        blob = tensor_bytes(tensors)
        base = {"form": form, "bytes": len(blob)}
        payload.append(torch.frombuffer(bytearray(blob), dtype=torch.uint8))
    about = {"round": broadcast.round, "schema": layout.schema, "roles": list(roles), "base": base}
    return Message.of(payload, kind=kind, **about, **header)


def read_broadcast(message: Message, form: Adapter, recipe: Recipe) -> Broadcast:
    """The broadcast in a request; what does not travel is `form`'s. Raises `MessageError`."""
    layout = Layout.of(form, broadcast_parts(recipe))
    _agree(layout, message)
    number, reader = count_of(message.header, "round"), Reader(message)
    if number > recipe.rounds:
        raise MessageError(f"the broadcast is of round {number}, and the recipe has {recipe.rounds} rounds")
    roles = value_of(message.header, "roles", list)
    if any(role not in _ROLES for role in roles):
        raise MessageError(f"the broadcast holds {shown(roles)}, which this version of fedrot does not know")
    found = {role: layout.unpack(reader.numbers(layout.size), form) for role in ("adapter", *roles)}
    base = message.header.get("base")
    delta = None if base is None else _read_base(base, reader)
    reader.end()
    return Broadcast(round=number, base_delta=delta, **found)


def _read_base(base: Any, reader: Reader) -> Adapter:
    try:
        blob = reader.bytes(count_of(base, "bytes"))
        return unpack_adapter(base["form"], "base", safetensors.torch.load(blob.numpy().tobytes()))
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as problem:
        raise MessageError(f"the broadcast's change of the base cannot be read ({str(problem)[:100]})") from None


def upload_message(made: Round, broadcast: Broadcast, recipe: Recipe) -> Message:
    """A site's reply after training."""
    upload = made.upload
    layout = Layout.of(broadcast.adapter, travelling_parts(recipe, broadcast.round))
    payload = [layout.pack(upload.adapter) if made.payload is None else made.payload]
    payload += [upload.rotation[name].detach().float() for name in sorted(upload.rotation)]
    if upload.variate is not None:
        payload.append(layout.pack(upload.variate))
    return Message.of(
        payload,
        round=broadcast.round,
        schema=layout.schema,
        held=upload.held,
        used=upload.used,
        turned=bool(upload.rotation),
        variate=upload.variate is not None,
        metrics=dict(upload.metrics),
        layers={name: dict(numbers) for name, numbers in upload.layers.items()},
        seconds=dict(upload.seconds),
    )


def read_upload(message: Message, client: str, broadcast: Broadcast, recipe: Recipe) -> Upload:
    """The upload in a site's reply, who sent it being known from elsewhere. Raises `RejectedUpload` with the reason;
    what an upload must be, whatever way it came, is checked afterwards by `check_upload`.
    """
    form = broadcast.adapter
    layout = Layout.of(form, travelling_parts(recipe, broadcast.round))
    header, reader = message.header, Reader(message)
    try:
        only(header, _UPLOAD)
        of_round(header, broadcast.round)
        layout.agree(value_of(header, "schema", str))
        codec = recipe.federation.compression
        adapter = decompress(reader.bytes(payload_bytes(layout, codec)), form, layout, codec)
        rotation = _read_rotation(reader, form) if value_of(header, "turned", bool) else {}
        variate = None
        if value_of(header, "variate", bool):
            variate = layout.unpack(reader.numbers(layout.size), form.map(torch.zeros_like))
        reader.end()
        layers = value_of(header, "layers", dict)
        only(layers, form.layers)
        return Upload(
            client=client,
            adapter=adapter,
            held=count_of(header, "held"),
            used=count_of(header, "used"),
            rotation=rotation,
            metrics=numbers_of(header, "metrics", METRICS),
            layers={name: numbers_of(layers, name, DRIFT_KEYS) for name in layers},
            seconds=numbers_of(header, "seconds", _PHASES),
            variate=variate,
        )
    except (MessageError, AdapterError) as problem:
        raise RejectedUpload(f"upload: {problem}") from None


def _read_rotation(reader: Reader, form: Adapter) -> dict[str, Tensor]:
    ranks: Sequence[tuple[str, int]] = [(name, form.layers[name].rank) for name in sorted(form.layers)]
    return {name: reader.numbers(rank * rank).view(rank, rank) for name, rank in ranks}


def adapter_message(adapter: Adapter, parts: frozenset[str], **header: Any) -> Message:
    """A question or an answer of a second phase: some parts of an adapter."""
    layout = Layout.of(adapter, parts)
    return Message.of([layout.pack(adapter)], schema=layout.schema, **header)


def read_adapter(message: Message, form: Adapter, parts: frozenset[str]) -> Adapter:
    """The adapter in it; the other parts are `form`'s. Raises `MessageError`."""
    layout, reader = Layout.of(form, parts), Reader(message)
    _agree(layout, message)
    found = layout.unpack(reader.numbers(layout.size), form)
    reader.end()
    return found


def _agree(layout: Layout, message: Message) -> None:
    """Raise `MessageError` unless the message's tensors lie as in the layout."""
    try:
        layout.agree(value_of(message.header, "schema", str))
    except AdapterError as problem:
        raise MessageError(str(problem)) from None
