"""Alignment in a Flower app of your own: one line, `ClientApp(mods=[align_mod()])`.

For apps whose train messages carry PEFT's state of an adapter (`get_peft_model_state_dict`) as an ArrayRecord, as
FlowerTune's do. The arrays that came are what the client's are turned to, so a client that skipped rounds aligns to
what it was sent this round. Products B A stay what they were; everything that is no factor goes through untouched.
"""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedrot.core.alignment import Softening, Strength
from fedrot.core.errors import AdapterError
from fedrot.core.methods.base import Broadcast, Seat
from fedrot.core.methods.rotation import FedRot, Schedule
from fedrot.running.flower.state import ALIGNED, read_state, write_state


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
        sent = read_state(_record(message, arrays, "the message"), "align_mod: the message", head=False)
        number = _round(message, config, round_key) if factor == "alternate" else 1
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        back = _record(reply, arrays, "the reply")
        mine = read_state(back, "align_mod: the reply", head=False)
        result = method.client(mine, Broadcast(number, sent), Seat("client"), torch.Generator())
        reply.content[arrays] = write_state(result.adapter, back)
        reply.content[ALIGNED] = ConfigRecord({"by": "align_mod"})
        return reply

    return mod


def _record(message: Message, record: str, who: str) -> ArrayRecord:
    if record not in message.content.array_records:
        has = ", ".join(message.content.array_records) or "none"
        raise AdapterError(f"align_mod: {who} has no ArrayRecord {record!r}; it has {has} (align_mod's arrays)")
    return message.content.array_records[record]


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
