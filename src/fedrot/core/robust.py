"""Rules against hostile clients: what of a round's uploads may reach the server's mean.

(B R)(R^T A) = B A: numbers of two clients' factors can be compared in one frame only, and a hostile client sends the
frame it likes. So every upload is first turned to the broadcast's frame here (`in_frame`), whatever its client says
that it did. Of n uploads of P numbers and rank r, f may be arbitrary:

- norm (arXiv 1911.07963): the weighted mean of changes, each scaled down to a bound. None counts more than the bound,
  and f < n/2 cannot raise a bound that is a multiple of the median. O(n P).
- median, trimmed (arXiv 1803.01498): of every number the median, or the mean without the f least and f largest values.
  For f < n/2 the result is in the honest clients' range. O(n log n P).
- krum (arXiv 1703.02757): the mean of the uploads that lie closest to the others, for f < (n - 2) / 2. O(n^2 r P).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of, stacks
from fedrot.core.alignment import Rotations, find_rotations, rotate
from fedrot.core.errors import FedrotError
from fedrot.core.methods.base import Upload
from fedrot.core.settings import RobustSettings


@dataclass(frozen=True)
class Accepted:
    """What a rule lets through of a round's uploads."""

    uploads: tuple[Upload, ...]  # whose weighted mean is taken; by coordinate, those numbers that the rule may use
    kept: Mapping[str, float]  # client -> how much of its upload: the scale of its change, or the share of its numbers
    mean: Adapter | None = None  # by coordinate, the mean itself


def hostile_of(settings: RobustSettings, clients: int) -> int:
    """f, the clients of a round that are assumed to be hostile: `share` of all that were asked, one at least."""
    return max(1, math.floor(settings.share * clients + 1e-9))


def least_uploads(settings: RobustSettings, hostile: int) -> int:
    """The uploads without which the rule does not hold against so many hostile ones."""
    return {"median": 2 * hostile + 1, "trimmed": 2 * hostile + 1, "krum": 2 * hostile + 3}.get(settings.rule, 1)


def check_count(settings: RobustSettings, uploads: int, clients: int) -> None:
    """Raise `FedrotError` where the rule cannot hold with so many uploads of the clients that were asked."""
    hostile = hostile_of(settings, clients)
    if uploads < (least := least_uploads(settings, hostile)):
        raise FedrotError(
            f"robust.rule {settings.rule} needs {least} uploads to hold against {hostile} hostile of {clients} clients "
            f"(robust.share {settings.share:g}), there are {uploads}"
        )


def in_frame(upload: Upload, form: Adapter, parts: frozenset[str]) -> Upload:
    """The upload as rules read it: in the frame of `form` (the broadcast), in float32 or better; parts that do not
    travel are `form`'s own, whatever was sent.

    R = argmin over SO(r) of ||R^T A - A_ref||, then of both factors, each over its mean squared residual (joint,
    strength 1; `alignment.align`): residuals depend on the frame, and after the first turn it is the same one for all
    that a client may send. The products stay. Where one factor travels, the other fixes the frame and nothing turns.
    """
    sent = {name: t for name, t in upload.adapter.tensors() if part_of(name) in parts}
    # In float64: a sum of the largest float32 numbers is none.
    adapter = form.with_tensors(dict(form.tensors()) | sent).map(Tensor.double)
    rotation: Rotations = upload.rotation
    if {"a", "b"} <= parts:
        first = find_rotations(adapter, form, "A", 1.0)
        second = find_rotations(rotate(adapter, first), form, "joint", 1.0)
        turn = {name: r @ second[name] for name, r in first.items()}
        adapter = rotate(adapter, turn)
        rotation = {name: rotation[name].double() @ r if rotation else r for name, r in turn.items()}
    tensors = dict(form.tensors())
    fitted = {name: _fitted(t, tensors[name]) for name, t in adapter.tensors()}
    return replace(upload, adapter=form.with_tensors(fitted), rotation=rotation)


def _fitted(tensor: Tensor, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    most = torch.finfo(dtype).max
    return tensor.clamp(-most, most).to(dtype)


def accept(
    settings: RobustSettings, uploads: Sequence[Upload], form: Adapter, parts: frozenset[str], clients: int
) -> Accepted:
    """What `settings.rule` lets through of uploads that `in_frame` gave, in their order.

    `form` is the broadcast, `parts` are those that travelled, `clients` all that were asked. Raises `FedrotError`
    where there are too few uploads for the rule (`check_count`).
    """
    check_count(settings, len(uploads), clients)
    hostile = hostile_of(settings, clients)
    adapters = [upload.adapter for upload in uploads]
    names = [upload.client for upload in uploads]
    if settings.rule in ("median", "trimmed"):
        cut = (len(uploads) - 1) // 2 if settings.rule == "median" else hostile
        mean, low, high = trimmed_mean(adapters, form, parts, cut, hostile)
        held = [_held(adapter, low, high) for adapter in adapters]
        kept = {name: _within(adapter, low, high) for name, adapter in zip(names, adapters, strict=True)}
        return Accepted(_with(uploads, held), kept, mean)
    norms = change_norms(adapters, form)
    if settings.rule == "norm":
        scales = bound_scales(norms, settings.bound, settings.multiple)
        limited = [scaled(adapter, form, c) for adapter, c in zip(adapters, scales, strict=True)]
        return Accepted(_with(uploads, limited), dict(zip(names, scales, strict=True)))
    # Products do not see one factor stretched and the other shrunk by as much, which would spoil the factors' mean:
    # what moved the factors too far is not chosen.
    near = [c == 1.0 for c in bound_scales(norms, None, settings.multiple)]
    order = [i for i in krum_order(product_distances2(adapters, form), hostile) if near[i]]
    chosen = sorted(order[: min(settings.chosen or len(uploads), len(uploads) - hostile - 2)])
    return Accepted(tuple(uploads[i] for i in chosen), {name: float(i in chosen) for i, name in enumerate(names)})


def _with(uploads: Sequence[Upload], adapters: Sequence[Adapter]) -> tuple[Upload, ...]:
    return tuple(replace(u, adapter=adapter) for u, adapter in zip(uploads, adapters, strict=True))


def change_norms(adapters: Sequence[Adapter], form: Adapter) -> list[float]:
    """||x_i - x_ref|| over all numbers of both factors and the head."""
    tensors = {name: t.double() for name, t in form.tensors()}
    return [math.sqrt(sum(float((t - tensors[n]).square().sum()) for n, t in a.tensors())) for a in adapters]


def bound_scales(norms: Sequence[float], bound: float | None, multiple: float) -> list[float]:
    """c_i = min(1, bound / norm_i); without a bound it is `multiple` times the median norm (Sun et al. 2019).

    Of an even number of norms the lower middle one is the median, which half of the clients cannot raise.
    """
    most = bound if bound is not None else multiple * sorted(norms)[(len(norms) - 1) // 2]
    return [1.0 if norm <= most else most / norm for norm in norms]


def scaled(adapter: Adapter, form: Adapter, scale: float) -> Adapter:
    """x_ref + c (x - x_ref); the adapter itself where c is 1."""
    if scale == 1.0:
        return adapter
    tensors = dict(form.tensors())
    moved = {n: (tensors[n] + scale * (t.double() - tensors[n])).to(t.dtype) for n, t in adapter.tensors()}
    return adapter.with_tensors(moved)


def trimmed_mean(
    adapters: Sequence[Adapter], form: Adapter, parts: frozenset[str], cut: int, hostile: int
) -> tuple[Adapter, dict[str, Tensor], dict[str, Tensor]]:
    """Every number's mean over the clients without its `cut` least and `cut` largest values (Yin et al. 2018), and its
    range without the `hostile` least and largest ones.

    `cut` = (n - 1) // 2 leaves the middle one or two: the median. Changes from the broadcast have the same one. The
    mean comes back in `form`'s dtypes, parts that did not travel are its own. At most `hostile` values lie outside of
    the honest clients' on either side, so both ends of the range lie among these.
    """
    tensors, low, high = dict(form.tensors()), {}, {}
    columns = [dict(adapter.tensors()) for adapter in adapters]
    for name in [name for name in tensors if part_of(name) in parts]:
        values = torch.stack([column[name].double() for column in columns]).sort(dim=0).values
        low[name], high[name] = values[hostile].clone(), values[len(values) - 1 - hostile].clone()
        tensors[name] = values[cut : len(values) - cut].mean(0).to(tensors[name].dtype)
    return form.with_tensors(tensors), low, high


def _within(adapter: Adapter, low: Mapping[str, Tensor], high: Mapping[str, Tensor]) -> float:
    """The share of the adapter's numbers in the range."""
    tensors = dict(adapter.tensors())
    inside = sum(int(((tensors[n] >= low[n]) & (tensors[n] <= high[n])).sum()) for n in low)
    return inside / sum(t.numel() for t in low.values())


def _held(adapter: Adapter, low: Mapping[str, Tensor], high: Mapping[str, Tensor]) -> Adapter:
    """The adapter with numbers outside the range moved to its ends."""
    tensors = dict(adapter.tensors())
    held = {n: tensors[n].double().clamp(low[n], high[n]).to(tensors[n].dtype) for n in low}
    return adapter.with_tensors(tensors | held)


def product_distances2(adapters: Sequence[Adapter], form: Adapter) -> Tensor:  # (N, N) float64
    """||s B_i A_i - s B_j A_j||_F^2 over all layers, plus the heads' squared distance; the same in every frame.

    For the changes (E_i, D_i) of (B_i, A_i) from the broadcast's (B, A), `form`, the products change by P_i = E_i A +
    B D_i + E_i D_i. ||P_i - P_j||^2 comes from r x r blocks of the Gram matrices of all changes: distances down to 1e-8
    of the changes keep their digits, however large the products are. O(N^2 r^2 (d_in + d_out)).
    """
    found = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for stack in stacks([form, *adapters], torch.float64):
        a, b = stack.a, stack.b * stack.scale[..., None, None]
        for layer in range(len(stack.names)):
            rows, columns = a[:, layer], b[:, layer].mT
            inner = _change_inner(*(_gram_blocks(torch.cat([x[:1], x[1:] - x[:1]])) for x in (columns, rows)))
            norms2 = inner.diagonal()
            found += (norms2[:, None] + norms2 - 2 * inner).clamp_min(0.0).cpu()
    for name in form.head:
        heads = torch.stack([adapter.head[name].double().flatten() for adapter in adapters])
        found += torch.cdist(heads, heads, compute_mode="donot_use_mm_for_euclid_dist").square().cpu()
    return found


def _gram_blocks(rows: Tensor) -> Tensor:  # (N + 1, r, d) -> (N + 1, N + 1, r, r), the blocks x_i x_j^T
    flat = rows.flatten(0, 1)
    return (flat @ flat.mT).unflatten(1, rows.shape[:2]).unflatten(0, rows.shape[:2]).transpose(1, 2)


def _change_inner(of_b: Tensor, of_a: Tensor) -> Tensor:  # (N + 1, N + 1, r, r) twice -> (N, N)
    """<P_i, P_j> from Gram blocks of [B, E_1, ...] and [A, D_1, ...]: <U V, U' V'> = sum (U^T U') * (V V'^T)."""
    own = torch.arange(1, len(of_b))
    base = torch.zeros_like(own)
    terms = ((own, base), (base, own), (own, own))  # E_i A, B D_i, E_i D_i
    inner = torch.zeros(len(own), len(own), dtype=of_b.dtype, device=of_b.device)
    for b, a in terms:
        for b2, a2 in terms:
            inner += (of_b[b[:, None], b2] * of_a[a[:, None], a2]).sum((-2, -1))
    return inner


def krum_order(distances2: Tensor, hostile: int) -> list[int]:
    """The uploads by Krum's score, the best first, equal ones as they came (Blanchard et al. 2017).

    A score is the sum of the squared distances (N, N) to the n - f - 2 nearest others.
    """
    n = distances2.shape[0]
    others = distances2.masked_fill(torch.eye(n, dtype=torch.bool), math.inf)
    scores = others.sort(dim=1).values[:, : n - hostile - 2].sum(1)
    return scores.argsort(stable=True).tolist()
