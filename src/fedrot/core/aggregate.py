"""`fedrot.aggregate`: several adapters to one, by any method that needs no training round."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair, same_form
from fedrot.core.alignment import check_finite
from fedrot.core.diagnostics import AggregationErrors, exact_errors, sent_errors
from fedrot.core.errors import AdapterError, FedrotError, RecipeError, choices
from fedrot.core.methods import get_method, methods
from fedrot.core.methods.base import ALL_PARTS, Broadcast, Method, Reduced, Seat, ServerState
from fedrot.core.products import joined
from fedrot.core.ranks import first_frames, pad
from fedrot.core.reduce import Reduction, as_float32
from fedrot.core.seeding import generator


@dataclass(frozen=True)
class Combined:
    """An adapter made of several, and what was lost of their weighted sum."""

    adapter: Adapter
    errors: AggregationErrors


def aggregate(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "fedit",
    reference: Adapter | None = None,
    **settings: Any,
) -> Adapter:
    """Combine adapters of the same layers into one adapter, as the server of a federated round would.

    Args:
        adapters: at least one; the same layers and head tensors. Half precision is widened to float32. Ranks may
            differ, layer by layer, and so may alpha: the result has the largest rank and the first adapter's scale.
        weights: one positive number an adapter, e.g. its number of training examples, from 1e-100 to 1e100; they need
            not sum to one. None weighs all alike.
        method: the name of a registered method that needs no training round. One that changes the base model gives
            the change back as extra rank.
        reference: the common starting point that `fedrot` aligns to, e.g. the adapter that all were trained from; its
            rank is the largest.
        settings: the method's own, e.g. strength=0.4, factor="B". Alignment always rotates here, by factor A unless
            given.

    Raises:
        ValueError: adapters of different form, weights that are not positive numbers, an unknown method, a setting that
            it has not or of another type, a reference that is missing or of another form.
    """
    chosen, parts, weights, frame = _prepared(adapters, weights, method, reference, settings)
    return _combine(chosen, parts, weights, frame)


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "fedit",
    reference: Adapter | None = None,
    **settings: Any,
) -> Combined:
    """`aggregate`, with what it lost: `before` is the error of averaging the factors as they are, `sent` that of the
    result, `floor` that of the best adapter of its rank; see `AggregationErrors`.
    """
    chosen, parts, weights, frame = _prepared(adapters, weights, method, reference, settings)
    made = _combine(chosen, parts, weights, frame)
    return Combined(made, errors_of(parts, weights, made))


def errors_of(adapters: Sequence[Adapter], weights: Sequence[float], made: Adapter) -> AggregationErrors:
    """What `made` lost of the adapters' weighted sum; the adapters have one form, `made` may have any rank."""
    layers = exact_errors(list(adapters), list(weights))
    for name, error2 in sent_errors(adapters, weights, [made]).items():
        layers[name]["sent2"] = error2
    return AggregationErrors(layers, estimated=False, clients=len(adapters))


def alike(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters in one form, their updates kept: padded to the largest rank of each layer, at the first one's scale.

    Half precision is widened only where a scale is converted: alignment must know what is rounding in the factors.
    Raises `AdapterError` naming the adapter that has other layers, outer shapes, orientation or head.
    """
    for index, adapter in enumerate(adapters):
        check_finite(adapter)
        same_form(_outer(adapter), _outer(adapters[0]), who=f"adapters[{index}]")
        for name, pair in adapter.layers.items():
            if pair.fan_in_fan_out != adapters[0].layers[name].fan_in_fan_out:
                raise AdapterError(
                    f"adapters[{index}]: layer {name!r} has fan_in_fan_out {pair.fan_in_fan_out}: it fits other base "
                    "layers"
                )
    layers = {}
    for name, pair in adapters[0].layers.items():
        widest = max((adapter.layers[name] for adapter in adapters), key=lambda p: p.rank)
        layers[name] = replace(pair, a=widest.a, b=widest.b)
    return [_like(adapter, replace(adapters[0], layers=layers)) for adapter in adapters]


def _like(adapter: Adapter, form: Adapter) -> Adapter:
    """`adapter` at the ranks and scales of `form`."""
    layers = {}
    for name, pair in adapter.layers.items():
        one = Adapter({name: form.layers[name]})
        if pair.scale != form.layers[name].scale:
            pair = as_float32(Adapter({name: pair})).layers[name]
        layers[name] = pad(Adapter({name: pair}), first_frames(one, pair.rank), one).layers[name]
    return replace(adapter, layers=layers)


def _outer(adapter: Adapter) -> Adapter:
    """The adapter's names and outer shapes, at rank one, to compare what must be the same."""
    layers = {
        name: LoraPair(pair.a[:1], pair.b[:, :1], pair.scale, pair.fan_in_fan_out)
        for name, pair in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def _prepared(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    method: str,
    reference: Adapter | None,
    settings: dict[str, Any],
) -> tuple[Method, list[Adapter], list[float], Adapter]:
    """(method, adapters of one form, weights, what to align to); raises what `aggregate` does."""
    if not adapters:
        raise FedrotError("there are no adapters to aggregate")
    adapters = [adapter.map(Tensor.detach) for adapter in adapters]
    weights = [1.0] * len(adapters) if weights is None else [_number(w, f"weights[{i}]") for i, w in enumerate(weights)]
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
    parts = alike(adapters)
    if reference is not None:
        reference = reference.map(Tensor.detach)
        check_finite(reference)
        bare = (_outer(replace(reference, head={})), _outer(replace(parts[0], head={})))  # the head is not rotated
        same_form(*bare, who="reference", other="the adapters")
        for name, pair in parts[0].layers.items():
            if reference.layers[name].rank != pair.rank:
                raise AdapterError(
                    f"reference: layer {name!r} has rank {reference.layers[name].rank}, "
                    f"the widest adapter has {pair.rank}"
                )
        reference = _like(reference, parts[0])
    return kind.standalone(**settings), parts, weights, reference or _mean(parts, weights)


def _number(value: Any, key: str) -> float:
    """The value as a float, whatever kind of number it is. Raises `FedrotError` naming the key."""
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise FedrotError(f"{key} must be a number, got {value!r}")


def _mean(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The factor-wise mean, which stands in where there is no common start: no adapter is privileged."""
    mean = Reduction(as_float32(adapters[0]), ALL_PARTS)
    for adapter, weight in zip(adapters, weights, strict=True):
        mean.add(adapter, weight)
    return mean.result().mean


def _combine(method: Method, adapters: Sequence[Adapter], weights: Sequence[float], reference: Adapter) -> Adapter:
    # Round 1 is the first in which a method does all that it does.
    state = ServerState(Broadcast(round=1, adapter=reference))
    reduction = Reduction(as_float32(adapters[0]), method.uploads(1), keep=method.capabilities.reduction == "factors")
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        result = method.client(adapter, state.broadcast, Seat(name=str(index)), generator("aggregate", index))
        reduction.add(result.adapter, weight)
    reduced = reduction.result()
    if method.capabilities.second_phase:
        reduced = replace(reduced, answer=_answers(method, state, reduced, adapters, weights))
    sent = method.server(state, reduced, generator("aggregate", "server")).broadcast
    return sent.adapter if sent.base_step is None else joined(sent.adapter, sent.base_step)


def _answers(
    method: Method, state: ServerState, reduced: Reduced, adapters: Sequence[Adapter], weights: Sequence[float]
) -> Adapter:
    """The mean of the second phase's answers."""
    question = method.ask(state, reduced)
    reduction = Reduction(question, frozenset({"a"}))
    for adapter, weight in zip(adapters, weights, strict=True):
        reduction.add(method.answer(adapter, question), weight)
    return reduction.result().mean
