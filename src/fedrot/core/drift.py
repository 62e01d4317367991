"""How far a client's factors moved from the broadcast in local training, and how much of that only turned the frame.

Computed in the client's seat from its own factors, so it is known under secure aggregation too. Not by principal
angles between row spaces: they do not change under rotation and could not show what alignment does.
"""

from collections.abc import Mapping

import torch

from fedrot.core.adapter import Adapter, stacks
from fedrot.core.alignment import Rotations
from fedrot.core.linalg import gauge_share, rotation_angle

DRIFT_KEYS = ("drift_a", "drift_b", "move2", "gauge2", "angle", "turn")


def client_drift(local: Adapter, broadcast: Adapter, rotations: Rotations) -> dict[str, dict[str, float]]:
    """By layer, before alignment: `drift_a` = ||A_i - A_ref||, `drift_b` = ||B_i - B_ref||, `move2` = the sum of their
    squares, `gauge2` = its part along the gauge orbit; and of the rotation applied, `angle` (radians, the largest
    turn of any plane) and `turn` = ||R - I||_F, both 0 where none was.
    """
    found: dict[str, dict[str, float]] = {}
    for stack in stacks([local, broadcast], torch.float64):
        (a, a_ref), (b, b_ref) = stack.a, stack.b
        gauge, move = gauge_share(a, b, a_ref, b_ref)
        columns = {
            "drift_a": (a - a_ref).norm(dim=(-2, -1)),
            "drift_b": (b - b_ref).norm(dim=(-2, -1)),
            "move2": move,
            "gauge2": gauge,
            "angle": torch.zeros_like(move),
            "turn": torch.zeros_like(move),
        }
        if rotations:
            r = torch.stack([rotations[name] for name in stack.names])
            columns["angle"] = rotation_angle(r)
            columns["turn"] = (r - torch.eye(r.shape[-1], dtype=r.dtype)).norm(dim=(-2, -1))
        listed = {key: values.tolist() for key, values in columns.items()}
        for i, name in enumerate(stack.names):
            found[name] = {key: values[i] for key, values in listed.items()}
    return found


def summarise_drift(clients: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """A round's drift over clients: factors over all layers together, then mean, least and largest over clients.

    Empty where no client reported any.
    """
    totals = [
        {key: sum(layer[key] ** power for layer in layers.values()) for key, power in _POWERS.items()}
        | {"angle": max(layer["angle"] for layer in layers.values())}
        for layers in clients.values()
        if layers
    ]
    if not totals:
        return {}
    drift_a = [t["drift_a"] ** 0.5 for t in totals]
    drift_b = [t["drift_b"] ** 0.5 for t in totals]
    shares = [t["gauge2"] / t["move2"] if t["move2"] > 0 else 0.0 for t in totals]
    ratios = [t["turn"] ** 0.5 / a if a > 0 else 0.0 for t, a in zip(totals, drift_a, strict=True)]
    count = len(totals)
    return {
        "a_mean": sum(drift_a) / count,
        "a_min": min(drift_a),
        "b_mean": sum(drift_b) / count,
        "b_min": min(drift_b),
        "gauge_share": sum(shares) / count,
        "angle_mean": sum(t["angle"] for t in totals) / count,
        "angle_max": max(t["angle"] for t in totals),
        "turn_mean": sum(t["turn"] ** 0.5 for t in totals) / count,
        "turn_per_drift_max": max(ratios),
    }


_POWERS = {"drift_a": 2, "drift_b": 2, "turn": 2, "gauge2": 1, "move2": 1}
