"""Server optimizers on the averaged change: momentum, Adam and Yogi (Reddi et al., arXiv 2003.00295, algorithm 2)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.settings import ServerSettings

PREFIX = "server/"  # of the moments' names in the server's memory


def server_step(
    settings: ServerSettings, old: Adapter, mean: Adapter, parts: frozenset[str], memory: Mapping[str, Tensor]
) -> tuple[Adapter, dict[str, Tensor]]:
    """What `mean` becomes when its change from `old` is stepped on, and the moments, in float64.

    Only tensors of `parts`, those that were trained in this round, are moved, and only their moments: a factor that
    was frozen keeps both. For Delta = mean - old: m <- beta1 m + (1 - beta1) Delta; Adam's v <- beta2 v +
    (1 - beta2) Delta^2, Yogi's v <- v - (1 - beta2) sign(v - Delta^2) Delta^2, both from epsilon^2;
    x <- old + lr m / (sqrt(v) + epsilon). Momentum: m <- beta1 m + Delta, x <- old + lr m. No bias correction.
    """
    if settings.optimizer == "none":
        return mean, dict(memory)
    rate = settings.lr if settings.lr is not None else 1.0 if settings.optimizer == "momentum" else 0.01
    moments = dict(memory)
    tensors = dict(mean.tensors())
    for name, start in old.tensors():
        if part_of(name) not in parts:
            continue
        delta = tensors[name].double() - start.double()
        m = moments.get(f"{PREFIX}m/{name}", torch.zeros_like(delta))
        if settings.optimizer == "momentum":
            m = settings.beta1 * m + delta
            step = m
        else:
            square = delta.square()
            v = moments.get(f"{PREFIX}v/{name}", torch.full_like(delta, settings.epsilon**2))
            m = settings.beta1 * m + (1 - settings.beta1) * delta
            if settings.optimizer == "adam":
                v = settings.beta2 * v + (1 - settings.beta2) * square
            else:
                v = v - (1 - settings.beta2) * torch.sign(v - square) * square
            step = m / (v.sqrt() + settings.epsilon)
            moments[f"{PREFIX}v/{name}"] = v
        moments[f"{PREFIX}m/{name}"] = m
        tensors[name] = (start.double() + rate * step).to(start.dtype)
    return mean.with_tensors(tensors), moments
