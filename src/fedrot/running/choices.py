"""The choices that a recipe leaves open: made once when a run begins, written down, kept when it is resumed."""

from dataclasses import replace

import numpy as np

from fedrot.core.errors import RecipeError
from fedrot.learning.architectures import PACKABLE
from fedrot.learning.capacity import available_threads, devices, even_width, fast_bfloat16, memory, stack_width
from fedrot.learning.checkpointing import layers_of
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel
from fedrot.learning.partition import Partition
from fedrot.running.recipe import Recipe
from fedrot.running.settings import drawn_count


def for_machine(recipe: Recipe) -> Recipe:
    """Device and precision. `RecipeError` for a device that is not there."""
    asked = recipe.compute
    device, there = devices(asked.device)
    if device == "cuda" and there == 0:
        raise RecipeError("compute.device: PyTorch sees no GPU here; use cpu")
    if device == "cuda" and (asked.workers or 1) > there:
        raise RecipeError(f"compute.workers is {asked.workers}, PyTorch sees {there} GPUs here")
    local = recipe.local
    if local.precision == "auto":
        local = replace(local, precision="bf16" if fast_bfloat16(device) else "fp32")
    return replace(recipe, compute=replace(asked, device=device), local=local)


def for_model(recipe: Recipe, model: ResidentModel, data: Encoded, partition: Partition) -> Recipe:
    """Packing, workers, threads and the width of the stack, for a recipe whose device is chosen. `RecipeError` where
    packing was asked for and the architecture is not known, or checkpointing and the layers cannot be told.
    """
    asked = recipe.compute
    if asked.packing and not model.packable:
        kind = model.model.config.model_type
        raise RecipeError(
            f"compute.packing: {kind} models cannot be packed, or attend in windows; those that can: "
            f"{', '.join(PACKABLE)}; set it to null or false"
        )
    if recipe.local.checkpointing:
        layers_of(model.model)
    packing = model.packable if asked.packing is None else asked.packing
    device, workers = devices(asked.device)
    sizes = [len(indices) for indices in partition.indices["train"].values()]
    clients = drawn_count(len(sizes), recipe.federation.participation)
    if recipe.method.capabilities.pooled:
        clients = 1
    workers = asked.workers or max(1, min(workers, clients))
    width = asked.stack
    if width is None:
        # A padded stack is as long as the longest example of any of its clients.
        tokens = float(data.lengths.mean() if packing else data.lengths.max())
        rows = min(recipe.local.batch, float(np.median(sizes))) * tokens
        there = memory(device) // (workers if device == "cpu" else 1)
        wanted = stack_width(model.model, rows, device, there, recipe.local.checkpointing)
        width = even_width(clients, min(wanted, 1024), workers)
    threads = asked.threads or max(1, available_threads() // workers)
    return replace(recipe, compute=replace(asked, packing=packing, workers=workers, stack=width, threads=threads))


def adopted(recipe: Recipe, resolved: Recipe) -> Recipe:
    """`recipe` with what it leaves open as it was chosen in `resolved`."""
    mine, theirs = vars(recipe.compute), vars(resolved.compute)
    compute = replace(recipe.compute, **{k: theirs[k] if v is None else v for k, v in mine.items()})
    local = recipe.local
    if local.precision == "auto":
        local = replace(local, precision=resolved.local.precision)
    return replace(recipe, compute=compute, local=local)


def described(recipe: Recipe) -> str:
    """How a resolved recipe's arithmetic is done, in a line for the log."""
    how, precision = recipe.compute, recipe.local.precision
    device = how.device or "cpu"
    fast = fast_bfloat16(device)
    if precision == "fp32":
        about = "fp32 (local.precision auto would take bf16, which is faster here)" if fast else "fp32"
    else:
        about = "bf16" if fast else "bf16, though this machine is faster at fp32"
    many = "one client after the other" if how.stack == 1 else f"{how.stack} clients at once"
    rows = "packed examples" if how.packing else "padded batches"
    workers = f"{how.workers} worker{'s' if how.workers != 1 else ''} of {how.threads} thread"
    return f"{device}, {workers}{'s' if how.threads != 1 else ''}, {about}, {many}, {rows}"
