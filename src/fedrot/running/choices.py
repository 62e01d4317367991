"""The choices that a recipe leaves open: made once when a run begins, written down, kept when it is resumed."""

from dataclasses import replace

import numpy as np

from fedrot.core.errors import RecipeError
from fedrot.learning.architectures import PACKABLE
from fedrot.learning.capacity import available_threads, devices, fast_bfloat16, memory, stack_width
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel
from fedrot.learning.partition import Partition
from fedrot.running.recipe import Recipe


def for_machine(recipe: Recipe) -> Recipe:
    """Device, workers, threads and precision. `RecipeError` for a device that is not there."""
    asked = recipe.compute
    device, workers = devices(asked.device, asked.workers)
    if device == "cuda":
        there = devices("cuda", None)[1]
        if there == 0:
            raise RecipeError("compute.device: PyTorch sees no GPU here; use cpu")
        if workers > there:
            raise RecipeError(f"compute.workers is {workers}, there are {there} GPUs")
    threads = asked.threads or max(1, available_threads() // workers)
    local = recipe.local
    if local.precision == "auto":
        local = replace(local, precision="bf16" if fast_bfloat16(device) else "fp32")
    compute = replace(asked, device=device, workers=workers, threads=threads)
    return replace(recipe, compute=compute, local=local)


def for_model(recipe: Recipe, model: ResidentModel, data: Encoded, partition: Partition) -> Recipe:
    """Packing and the width of the stack, for a recipe whose machine is chosen. `RecipeError` where packing was asked
    for and the architecture is not known.
    """
    asked = recipe.compute
    if asked.packing and not model.packable:
        kind = model.model.config.model_type
        raise RecipeError(
            f"compute.packing: {kind} models cannot be packed, or attend in windows; those that can: "
            f"{', '.join(PACKABLE)}; set it to null or false"
        )
    packing = model.packable if asked.packing is None else asked.packing
    width = asked.stack
    if width is None:
        lengths = data.lengths
        sizes = [len(indices) for indices in partition.indices["train"].values()]
        batch = min(recipe.local.batch, int(np.median(sizes)))
        # Batches are of like length, so padded ones are little longer than packed ones.
        rows = batch * float(lengths.mean()) * (1.0 if packing else 1.2)
        device = asked.device or "cpu"
        clients = 1 if recipe.method.capabilities.pooled else len(sizes)
        width = min(clients, 1024, stack_width(model.model, rows, device, memory(device)))
    return replace(recipe, compute=replace(asked, packing=packing, stack=width))


def adopted(recipe: Recipe, resolved: Recipe) -> Recipe:
    """`recipe` with what it leaves open as it was chosen in `resolved`."""
    mine, theirs = vars(recipe.compute), vars(resolved.compute)
    compute = replace(recipe.compute, **{k: theirs[k] if v is None else v for k, v in mine.items()})
    local = recipe.local
    if local.precision == "auto":
        local = replace(local, precision=resolved.local.precision)
    return replace(recipe, compute=compute, local=local)
