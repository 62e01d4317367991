"""`fedrot.aggregate`: several adapters to one, by any method that needs no training round."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from fedrot.core.adapter import Adapter, same_form, same_update
from fedrot.core.alignment import check_finite
from fedrot.core.errors import FedrotError, RecipeError, choices
from fedrot.core.methods import get_method, methods
from fedrot.core.methods.base import Broadcast, Seat, ServerState
from fedrot.core.reduce import Reduction, as_float32
from fedrot.core.seeding import generator


def aggregate(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "fedit",
    reference: Adapter | None = None,
    **settings: Any,
) -> Adapter:
    """Combine adapters of one form into one adapter, as the server of a federated round would.

    Args:
        adapters: at least one; the same layers, shapes and head tensors. Half precision is widened to float32.
        weights: one positive number an adapter, e.g. its number of training examples; they need not sum to one.
            None weighs all alike.
        method: the name of a registered method that needs no training round.
        reference: the common starting point that `fedrot` aligns to, e.g. the adapter that all were trained from.
        settings: the method's own, e.g. strength=0.4, factor="B". Alignment always rotates here, by factor A unless
            given.

    Raises:
        ValueError: adapters of different form, weights that are not positive, an unknown method or setting, a
            reference that is missing or of another form.
    """
    if not adapters:
        raise FedrotError("there are no adapters to aggregate")
    if weights is None:
        weights = [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise FedrotError(f"there are {len(adapters)} adapters and {len(weights)} weights; give one each")
    kind = get_method(method)
    if not kind.capabilities.standalone:
        offered = choices(n for n, m in methods().items() if m.capabilities.standalone)
        raise RecipeError(f"method {method!r} needs training rounds; choose {offered}")
    known = [f.name for f in fields(kind)]
    if unknown := sorted(set(settings) - set(known)):
        raise RecipeError(f"{unknown[0]!r} is not a setting of method {method!r}; it has {choices(known) or 'none'}")
    if kind.needs_reference and reference is None:
        raise RecipeError(f"method {method!r} aligns to a reference; give reference=, e.g. the common starting adapter")

    for index, adapter in enumerate(adapters):
        check_finite(adapter)
        same_form(adapter, adapters[0], who=f"adapters[{index}]")
        same_update(adapter, adapters[0], who=f"adapters[{index}]")
    if reference is not None:
        bare = (replace(reference, head={}), replace(adapters[0], head={}))  # the head is not rotated
        same_form(*bare, who="reference", other="the adapters")
    chosen = kind.standalone(**settings)
    # Round 1 is the first in which a method does all that it does.
    broadcast = Broadcast(round=1, adapter=reference or adapters[0])
    reduction = Reduction(as_float32(adapters[0]), chosen.uploads(1), keep=kind.capabilities.reduction == "factors")
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        result = chosen.client(adapter, broadcast, Seat(name=str(index)), generator("aggregate", index))
        reduction.add(result.adapter, weight)
    return chosen.server(ServerState(broadcast), reduction.result()).broadcast.adapter
