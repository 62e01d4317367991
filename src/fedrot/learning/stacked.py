"""Many clients in one forward and backward pass: the frozen base is applied once to all their rows.

Clients' factors stand side by side, A as (C, r, d_in) and B as (C, d_out, r), and so do their heads; each client's
rows meet its own factors in batched matrix products. Clients do not mix: a row's result depends on its own client
alone, so one with a loss that is not finite leaves the others as they were.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedrot.core.adapter import Adapter, part_of
from fedrot.learning.batching import Batch
from fedrot.learning.dropout import Key, Layout, dropped_share, keep_mask
from fedrot.learning.models import ResidentModel


@dataclass(frozen=True)
class Seats:
    """Which part of a batch belongs to which of the first C clients of a stack, or of C examples in their places."""

    examples: tuple[int, ...]  # (C) examples of each client
    tokens: tuple[int, ...]  # (C) tokens of each client, padding not counted
    rows: tuple[int, ...]  # (C) rows of each client in the base model's layers, padding counted
    keys: tuple[Key, ...]  # (C) names of the dropout masks
    layout: Layout

    @classmethod
    def of(cls, batch: Batch, examples: Sequence[int], keys: Sequence[Key]) -> "Seats":
        """For a batch of so many examples a client, client after client."""
        ends = np.cumsum(examples)
        tokens = tuple(int(mine.sum()) for mine in np.split(batch.lengths, ends[:-1]))
        longest = batch.layout.rows // len(batch.lengths)
        rows = tokens if batch.layout.places is None else tuple(count * longest for count in examples)
        return cls(tuple(examples), tokens, rows, tuple(keys), batch.layout)


class Stack:
    """C clients' adapters in the place of a resident model's own, for the time of `installed`."""

    def __init__(self, model: ResidentModel, adapters: Sequence[Adapter], parts: frozenset[str]) -> None:
        self._model, self._adapters = model, adapters
        self._seats: Seats | None = None
        dtypes = {name: tensor.dtype for name, tensor in model.parameters(frozenset({"a", "b", "head"}))}
        self._rank = max(pair.rank for adapter in adapters for pair in adapter.layers.values())
        flat = [dict(adapter.tensors()) for adapter in adapters]
        self._dtypes = dtypes
        self._tensors = self.stacked([{name: one[name] for name in dtypes} for one in flat])
        scales = {layer: [adapter.layers[layer].scale for adapter in adapters] for layer in model.lora_modules()}
        self._scales = {
            layer: torch.tensor(values, dtype=dtypes[f"layers/{layer}/a"], device=model.device)[:, None, None]
            for layer, values in scales.items()
        }
        self.trained = {name: t for name, t in self._tensors.items() if part_of(name) in parts}
        for tensor in self.trained.values():
            tensor.requires_grad_(True)
        self._used, self._used_scales = self._tensors, self._scales  # what the next forward pass works with

    def stacked(self, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of every client, by flat name, as the stack's own are: (C, ...), at the stack's rank. None: none."""
        names = tensors[0] if tensors else ()
        return {
            name: torch.stack(
                [self._at_rank(name, one[name]).to(self._model.device, self._dtypes[name]) for one in tensors]
            )
            for name in names
        }

    def own(self, client: int, name: str, tensor: Tensor) -> Tensor:
        """A copy of one client's part of a stacked tensor, at the client's own rank, in the CPU's memory."""
        mine, part = tensor[client].detach(), part_of(name)
        if part != "head":
            rank = self._adapters[client].layers[name.removeprefix("layers/").rpartition("/")[0]].rank
            mine = mine[:rank] if part == "a" else mine[:, :rank]
        return mine.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def _at_rank(self, name: str, tensor: Tensor) -> Tensor:
        """A narrow client's factors with zeros up to the stack's rank: their gradients are zero, so they stay zero."""
        if part_of(name) == "head":
            return tensor
        missing = self._rank - tensor.shape[0 if part_of(name) == "a" else 1]
        return nn.functional.pad(tensor, (0, 0, 0, missing) if part_of(name) == "a" else (0, missing))

    def adapter(self, client: int) -> Adapter:
        """A copy of one client's adapter as it is now, at the client's own rank."""
        form = self._adapters[client]
        return form.with_tensors({name: self.own(client, name, tensor) for name, tensor in self._tensors.items()})

    def seat(self, seats: Seats) -> None:
        """Say whose rows the next forward pass sees."""
        self._seats, self._used, self._used_scales = seats, self._tensors, self._scales

    def seat_examples(self, seats: Seats, owners: Sequence[int]) -> dict[str, Tensor]:
        """The same where every seat is one of E examples, of the client that `owners` says. Each has a copy of its
        client's tensors to itself. Given are those of `trained`, (E, ...): their gradients are the examples' own.
        """
        places = torch.tensor(owners, device=self._model.device)
        self._seats = seats
        self._used = {name: tensor.detach()[places] for name, tensor in self._tensors.items()}
        self._used_scales = {layer: scale[places] for layer, scale in self._scales.items()}
        return {name: self._used[name].requires_grad_(True) for name in self.trained}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model works with the stack's factors and heads instead of its own."""
        with ExitStack() as stack:
            for layer, module in self._model.lora_modules().items():
                stack.enter_context(forward_of(module, self._low_rank_forward(layer, module.get_base_layer())))
            for name, (wrapper, head) in self._model.head_modules().items():
                stack.enter_context(forward_of(wrapper, self._head_forward(name, head)))
            yield

    def _low_rank_forward(self, layer: str, base: nn.Module) -> Callable[[Tensor], Tensor]:
        p = self._model.dropout()

        def run(x: Tensor) -> Tensor:
            seats, scale = self._now(), self._used_scales[layer]
            a, b = self._used[f"layers/{layer}/a"], self._used[f"layers/{layer}/b"]
            flat = x.reshape(-1, x.shape[-1])
            # A layer behind the last attention may see only the tokens that are read.
            sizes = seats.rows if len(flat) == seats.layout.rows else seats.examples
            keep = self._keep(layer, p, *flat.shape) if p else None
            up = 1.0 / (1.0 - dropped_share(p)) if p else 1.0
            count = len(sizes)
            out = _LowRankAdd.apply(  # type: ignore[no-untyped-call]
                base(flat), flat, a[:count], b[:count], up * scale[:count], keep, sizes
            )
            return out.unflatten(0, x.shape[:-1])

        return run

    def _keep(self, layer: str, p: float, rows: int, width: int) -> Tensor:
        """The dropout masks of all rows, (rows, width) bool."""
        seats = self._now()
        masks = [keep_mask(key, layer, p, tokens, width) for key, tokens in zip(seats.keys, seats.tokens, strict=True)]
        return seats.layout.of_rows(torch.cat(masks), rows).to(self._model.device)

    def _head_forward(self, name: str, head: nn.Module) -> Callable[..., Tensor]:
        keys = [key for key, _ in head.named_parameters()]

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found = []
            for client, mine in enumerate(x.split(self._now().examples)):
                own = {key: self._used[f"head/{name}.{key}"][client] for key in keys}
                found.append(torch.func.functional_call(head, own, (mine, *args), kwargs))
            return torch.cat(found)

        return run

    def _now(self) -> Seats:
        if self._seats is None:
            raise RuntimeError("a stack was called before it was told whose rows it sees")
        return self._seats


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """`forward` in the place of the module's own."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class _LowRankAdd(torch.autograd.Function):
    """y + scale (x * keep) A_c^T B_c^T for the rows of each client c, written into y where y is a tensor of its own.

    Shapes: y (rows, d_out), x (rows, d_in), a (C, r, d_in), b (C, d_out, r), scale (C, 1, 1), keep (rows, d_in) bool;
    `sizes` are the rows of each client. Computed in y's dtype; a's and b's gradients come back in their own.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, keep: Tensor | None, sizes: tuple[int, ...]
    ) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            down, up = (scale * a).to(y.dtype), b.to(y.dtype)
            h = _by_client(_kept(x, keep, y.dtype), down.mT, sizes)
            out = y.clone() if y._is_view() else y
            if out is y:
                ctx.mark_dirty(y)
            _add_by_client_(out, h, up.mT, sizes)
        ctx.save_for_backward(x, down, up, scale, keep, h)
        ctx.sizes, ctx.dtype = sizes, a.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, scale, keep, h = ctx.saved_tensors
        (g,), sizes = grads, ctx.sizes
        gh = _by_client(g, up, sizes)
        gx = ga = gb = None
        if ctx.needs_input_grad[1]:
            gx = _by_client(gh, down, sizes)
            gx = (gx if keep is None else gx.mul_(keep)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            ga = scale * _outer_by_client(gh, _kept(x, keep, g.dtype), sizes).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            gb = _outer_by_client(g, h, sizes).to(ctx.dtype)
        return g, gx, ga, gb, None, None, None


def _kept(x: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if keep is None else x * keep


def _alike(sizes: Sequence[int]) -> bool:
    return all(size == sizes[0] for size in sizes)


def _by_client(
    x: Tensor,  # (rows, d)
    w: Tensor,  # (C, d, k)
    sizes: Sequence[int],
) -> Tensor:  # (rows, k)
    """Each client's rows times its own matrix."""
    if _alike(sizes):
        return (x.reshape(len(sizes), sizes[0], -1) @ w).flatten(0, 1)
    out = x.new_empty(len(x), w.shape[-1])
    for mine, rows, matrix in zip(out.split(list(sizes)), x.split(list(sizes)), w, strict=True):
        torch.mm(rows, matrix, out=mine)
    return out


def _add_by_client_(out: Tensor, x: Tensor, w: Tensor, sizes: Sequence[int]) -> None:
    """Out += `_by_client(x, w, sizes)` without a tensor of out's size."""
    for mine, rows, matrix in zip(out.split(list(sizes)), x.split(list(sizes)), w, strict=True):
        mine.addmm_(rows, matrix)


def _outer_by_client(
    left: Tensor,  # (rows, k)
    right: Tensor,  # (rows, d)
    sizes: Sequence[int],
) -> Tensor:  # (C, k, d)
    """left_c^T right_c for every client's rows."""
    if _alike(sizes):
        return left.reshape(len(sizes), sizes[0], -1).mT @ right.reshape(len(sizes), sizes[0], -1)
    pairs = zip(left.split(list(sizes)), right.split(list(sizes)), strict=True)
    return torch.stack([one.mT @ other for one, other in pairs])
