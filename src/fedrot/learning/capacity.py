"""What a machine can hold and does well: devices, threads, precision, and how many clients to stack.

All from what the machine is and from shapes, never by timing: a recipe gives the same choice each time.
"""

import os
from typing import Any, Literal

import torch
from torch import nn

from fedrot.learning.checkpointing import layers_of

Device = Literal["cpu", "cuda"]

# Matrix products are at full speed from about this many rows on; more only take memory (docs/performance.md).
_ROWS = {"cpu": 1024, "cuda": 32768}
# At most this share of the memory goes to what a forward pass keeps for the backward pass.
_MEMORY_SHARE = 0.25


# Beyond this many workers Python's one lock is felt.
_WORKERS = 8


def devices(kind: Device | None) -> tuple[Device, int]:
    """(kind of device, workers that it can do with): every GPU there is, or the CPU's cores.

    On the CPU, workers of one thread each are faster than one worker of as many threads (docs/performance.md).
    """
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    return kind, torch.cuda.device_count() if kind == "cuda" else min(_WORKERS, available_threads())


def available_threads() -> int:
    """Cores that this process may use, or OMP_NUM_THREADS where it is set."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fast_bfloat16(device: Device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32: GPUs that know it, CPUs with AMX or
    AVX512_BF16.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def memory(device: Device) -> int:
    """Bytes of memory of the device, whatever is in use now."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def stack_width(
    model: Any,
    rows: float,  # rows (tokens, with their padding) of one client's step
    device: Device,
    bytes_there: int,  # for each worker
    checkpointing: bool = False,
) -> int:
    """How many clients to train at once: enough for full matrix products, as far as the memory goes; at least one."""
    fits = _MEMORY_SHARE * bytes_there / activation_bytes(model, checkpointing)
    return max(1, int(min(_ROWS[device], fits) / max(1.0, rows)))


def even_width(clients: int, widest: int, workers: int) -> int:
    """The width, at most `widest`, at which the clients' stacks keep all workers busy to the end of a round."""
    stacks = -(-clients // max(1, widest))
    stacks += -stacks % workers
    return -(-clients // min(stacks, clients))


def activation_bytes(model: Any, checkpointing: bool = False) -> int:
    """About what the backward pass needs of one row: the inputs and outputs of all linear layers, half as much again
    for what lies between them, in float32. With `checkpointing`: the inputs of the transformer's layers, and all that
    of the widest one alone. Raises as `layers_of`.
    """
    from transformers.pytorch_utils import Conv1D

    # A language model's output layer is passed a few tokens at a time and keeps none of its scores (vocabulary.py).
    found: Any = getattr(model, "get_output_embeddings", None)
    last = found() if found is not None else None

    def width(part: nn.Module) -> int:
        linear = (m for m in part.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not last)
        return sum(sum(m.weight.shape) for m in linear)

    if not checkpointing:
        return max(1, 6 * width(model))
    layers = layers_of(model)
    widths = [width(layer) for layer in layers]
    return 6 * (width(model) - sum(widths) + max(widths)) + 4 * int(model.config.hidden_size) * len(layers)
