"""Alignment in a Flower app of your own: one line, `ClientApp(mods=[align_mod()])`.

For apps whose train messages carry PEFT's state of an adapter (`get_peft_model_state_dict`) as an ArrayRecord, as
FlowerTune's do. The arrays that came are what the client's are turned to, so a client that skipped rounds aligns to
what it was sent this round. Products B A stay what they were; everything that is no factor goes through untouched.
"""

import re
from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.alignment import Softening, Strength
from fedrot.core.errors import AdapterError
from fedrot.core.methods.base import Broadcast, Seat
from fedrot.core.methods.rotation import FedRot, Schedule

_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def align_mod(
    factor: Schedule = "alternate",
    strength: Strength = 0.4,
    softening: Softening = "linear",
    guard: bool = False,
    arrays: str = "arrays",
    config: str = "config",
    round_key: str = "server-round",
) -> Mod:
    """A mod that turns what a client sends back into the frame of what it was sent (arXiv 2602.23638).

    Args:
        factor: which factor is matched: 'alternate' is the paper's, A in odd rounds and B in even ones; or 'A', 'B',
            'joint'.
        strength: lambda in [0, 1], or 'auto'; see `fedrot.align`.
        softening: see `fedrot.align`.
        guard: see `fedrot.align`.
        arrays: the record of the adapter's state, in the message and in the reply.
        config: the record that holds the round's number; needed for 'alternate' only.
        round_key: its key. Flower counts rounds from 1; the paper from 0, where B is zero and nothing is turned.

    Raises:
        ValueError: at once for settings that cannot be; in a round, by the mod, where the record is missing, holds no
            factors, or a factor is without its partner or of another shape than the one that came.
    """
    method = FedRot(strength, factor, softening, guard)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        sent = _factors(_state(message, arrays, "the message"), "the message")
        number = _round(message, config, round_key) if factor == "alternate" else 1
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        back = _state(reply, arrays, "the reply")
        result = method.client(_factors(back, "the reply"), Broadcast(number, sent), Seat("client"), torch.Generator())
        turned = {**back, **_keys(result.adapter, back)}
        reply.content[arrays] = ArrayRecord({key: Array(tensor) for key, tensor in turned.items()})
        return reply

    return mod


def _state(message: Message, record: str, who: str) -> dict[str, Tensor]:
    if record not in message.content.array_records:
        has = ", ".join(message.content.array_records) or "none"
        raise AdapterError(f"align_mod: {who} has no ArrayRecord {record!r}; it has {has} (align_mod's arrays)")
    return dict(message.content.array_records[record].to_torch_state_dict())


def _round(message: Message, record: str, key: str) -> int:
    """The round as the paper counts it, from 0."""
    records = message.content.config_records
    found = records[record].get(key) if record in records else None
    if isinstance(found, bool) or not isinstance(found, int):
        raise AdapterError(
            f"align_mod: the message's {record!r} has no number of the round, {key!r}, which factor 'alternate' needs; "
            "say where it is by align_mod's config and round_key, or take another factor"
        )
    return found - 1


def _factors(state: Mapping[str, Tensor], who: str) -> Adapter:
    """The factors in a state; scales do not matter to a rotation."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if match := _FACTOR.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = tensor
    for layer, pair in found.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"align_mod: {who} has one factor of {layer} alone")
    if not found:
        raise AdapterError(f"align_mod: {who} holds no factors (keys that end in lora_A.weight and lora_B.weight)")
    return Adapter({layer: LoraPair(pair["A"], pair["B"], 1.0) for layer, pair in found.items()})


def _keys(adapter: Adapter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors under the state's keys and in its dtypes, so that they cost what they did."""
    found = {}
    for key, tensor in state.items():
        if match := _FACTOR.fullmatch(key):
            pair = adapter.layers[match[1]]
            found[key] = (pair.a if match[2] == "A" else pair.b).to(tensor.dtype)
    return found
