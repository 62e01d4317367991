"""Late uploads: what a client learnt from an older broadcast, as a change of the current one (FedBuff, Nguyen et al.,
arXiv 2106.06639).

A client that was sent (A_s, B_s) and comes back with (A_i, B_i) when the server is at (A, B) has learnt D = A_i - A_s
and E = B_i - B_s. Its factors themselves must not be averaged with those of others: they would take back what was
learnt since it was sent its own. So it counts as (A + w R^T D, B + w E R), and head by head likewise: w is the damping
of its staleness, and R turns the older broadcast to the frame of the current one. (B R)(R^T A) = B A holds for a pair,
not for a change: E belongs to the A_s that it was learnt beside, and added to a B whose columns were turned since it
would change the product by something else. What the client itself turned by stays: that is part of its change.
"""

import math
from dataclasses import replace
from typing import Literal

import torch

from fedrot.core.adapter import Adapter
from fedrot.core.alignment import Rotations, find_rotations, rotate, rotate_back
from fedrot.core.methods.base import Upload

Staleness = Literal["none", "sqrt", "linear"]


def damping(staleness: Staleness, late: int) -> float:
    """What a change counts that is `late` rounds late, tau: 1, 1 / sqrt(1 + tau) or 1 / (1 + tau)."""
    return {"none": 1.0, "sqrt": 1 / math.sqrt(1 + late), "linear": 1 / (1 + late)}[staleness]


def turn_between(sent: Adapter, now: Adapter, parts: frozenset[str]) -> Rotations:
    """R by layer, (r, r) float64: of an older broadcast to the frame of the current one, which has its form.

    Both factors in one Procrustes problem at full strength, and under the guard (`alignment.align`): what was learnt
    in between is no turn. Where one factor travels, the other fixes the frame and nothing turns: empty.
    """
    return find_rotations(sent, now, "joint", 1.0, guard=True) if {"a", "b"} <= parts else {}


def brought_up(upload: Upload, sent: Adapter, now: Adapter, turn: Rotations, damp: float) -> Upload:
    """The upload as one of the current broadcast `now`: `now` plus `damp` times its change from `sent`, turned.

    Parts that did not travel are `sent`'s in the upload and `now`'s in what comes back, bit for bit.
    """
    adapter = _moved(upload.adapter, sent, now, turn, damp)
    if not upload.rotation:
        return replace(upload, adapter=adapter)
    before = rotate_back(upload.adapter, upload.rotation)
    return replace(upload, adapter=adapter, unturned=_moved(before, sent, now, turn, damp))


def _moved(adapter: Adapter, sent: Adapter, now: Adapter, turn: Rotations, damp: float) -> Adapter:
    old, current = dict(sent.tensors()), dict(now.tensors())
    change = now.with_tensors({name: t.double() - old[name].double() for name, t in adapter.tensors()})
    if turn:
        change = rotate(change, turn)
    moved = {n: torch.add(current[n].double(), t, alpha=damp).to(current[n].dtype) for n, t in change.tensors()}
    return now.with_tensors(moved)
