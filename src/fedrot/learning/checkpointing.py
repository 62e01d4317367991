"""Gradient checkpointing (Chen et al., arXiv 1604.06174): layers that are computed again instead of being remembered.

Of a layer its input alone is kept; the backward pass puts it through the layer once more. Dropout masks have names, so
both times give the same bits. The last layer keeps what it computes: the backward pass begins there and would need it
again at once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fedrot.core.errors import RecipeError
from fedrot.learning.stacked import forward_of


def layers_of(model: Any) -> list[nn.Module]:
    """The transformer layers in their order: the one outer list of as many modules as the model's configuration says
    it has layers. Raises `RecipeError` where there is not just one such list.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise RecipeError(
            f"local.checkpointing: the layers of {model.config.model_type} models cannot be told from their other "
            "parts; set it to false"
        )
    return list(outer[0])


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Backward passes compute the layers of a transformers model again, all but the last. Raises as `layers_of`."""
    config = model.config
    with ExitStack() as stack:
        # Layers that are computed twice would write twice into a key-value cache.
        if hasattr(config, "use_cache"):
            stack.enter_context(_set(config, "use_cache", False))
        for layer in layers_of(model)[:-1]:
            stack.enter_context(forward_of(layer, _checkpointed(layer.forward, config)))
        yield


def _checkpointed(forward: Callable[..., Any], config: Any) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # The attention of a packed row is set back by the time of the backward pass (architectures.py).
        return nullcontext(), _set(config, "_attn_implementation", config._attn_implementation)

    def run(*args: Any, **kwargs: Any) -> Any:
        # Nothing in a layer draws from PyTorch's own generator.
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=False, **kwargs)

    return run


@contextmanager
def _set(config: Any, key: str, value: object) -> Iterator[None]:
    """`value` in the place of a configuration's own."""
    before = getattr(config, key)
    setattr(config, key, value)
    try:
        yield
    finally:
        setattr(config, key, before)
