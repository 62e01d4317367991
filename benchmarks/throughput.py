"""How much of the machine's matrix-product peak the training of MiniLM uses, and where the rest goes.

Counted are the products of the linear layers that the loss needs, for tokens that are no padding: everything in the
layers before the last; in the last one queries, keys and values for all tokens and the rest for those that the head
reads. The backward pass needs as much again, but for the first layer's queries, keys and values. Attention's own
products and LoRA's are not counted as useful.
"""

import time
from dataclasses import replace
from statistics import median

import torch

from fedrot.core.methods.base import Upload
from fedrot.learning.capacity import fast_bfloat16
from fedrot.running.prepare import Prepared
from fedrot.running.simulation import Simulation
from rounds import second_state
from table import Result, cpu

# Part of the name of PyTorch's operations -> where their time is counted, the first that fits.
KINDS = {
    "scaled_dot_product": "attention",
    "mm": "matrix products",
    "linear": "matrix products",
    "index": "spreading and collecting tokens",
    "cat": "spreading and collecting tokens",
    "split": "spreading and collecting tokens",
    "gelu": "GELU, layer norm, sums",
    "layer_norm": "GELU, layer norm, sums",
    "add": "GELU, layer norm, sums",
    "copy_": "copies: the bias before each product, changed layouts",
    "tanh": "GELU, layer norm, sums",
    "mul": "LoRA's scaling and dropout",
    "AdamW": "optimizer",
    "foreach": "optimizer",
    "addcdiv": "optimizer",
    "addcmul": "optimizer",
    "sqrt": "optimizer",
    "lerp": "optimizer",
}


def peak(precision: str, size: int = 2048, repeats: int = 5) -> float:
    """Multiply-adds a second, counted as two, of a product of square matrices in this precision: the best of some."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return max(2 * size**3 / cpu(lambda: a @ b) for _ in range(repeats))


def useful(ready: Prepared, tokens: int, examples: int) -> float:
    """Floating point operations that a BERT's training needs, as the module says."""
    config = ready.model.model.config
    d, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    qkv, rest = 3 * d * d, d * d + 2 * d * inner
    forward = (layers - 1) * (qkv + rest) * tokens + qkv * tokens + rest * examples
    backward = forward - qkv * tokens
    return 2.0 * (forward + backward)


def throughput(ready: Prepared, repeats: int) -> list[Result]:
    """The share of the peak, in float32 and where it is fast in bfloat16, and the shares of what is lost."""
    results = [Result("2. useful products / peak, training in fp32", share_of_peak(ready, repeats), "", 0.85, True)]
    padding = 1 - _tokens(ready)
    results.append(Result("2. padding, of the rows of linear layers", 100 * padding, "%"))
    ways = {"": ready}
    if fast_bfloat16("cpu"):
        half = replace(ready, recipe=replace(ready.recipe, local=replace(ready.recipe.local, precision="bf16")))
        share = share_of_peak(half, repeats)
        results.append(Result("2. useful products / peak, training in bf16", share, "", 0.5, True))
        ways["bf16: "] = half
    for about, one in ways.items():
        results += [Result(f"2. {about}time in {kind}", 100 * share, "%") for kind, share in _profile(one).items()]
    return results


def share_of_peak(ready: Prepared, repeats: int) -> float:
    """Useful products a second over the peak of the same precision, in turns with it: the median."""
    state = second_state(ready)
    engine = Simulation(ready)
    shares = []
    for _ in range(repeats + 1):
        top = peak(ready.recipe.local.precision)
        began = time.process_time()
        uploads = [one for one in engine.train(state.broadcast, engine.clients) if isinstance(one, Upload)]
        spent = time.process_time() - began
        # Alignment and drift belong to the clients' rounds and not to their training.
        spent -= sum(seconds for one in uploads for phase, seconds in one.seconds.items() if phase != "train")
        tokens = sum(int(one.metrics["tokens"]) for one in uploads)
        shares.append(useful(ready, tokens, sum(one.used for one in uploads)) / spent / top)
    return median(shares[1:])


def _tokens(ready: Prepared) -> float:
    """The share of a batch's rows that are tokens, as the model sees them."""
    rows = next(iter(ready.partition.indices["train"].values()))[: ready.recipe.local.batch]
    batch = ready.model.collate(ready.encoded["train"], rows, bool(ready.recipe.compute.packing))
    return float(batch.lengths.sum()) / batch.layout.rows


def _profile(ready: Prepared) -> dict[str, float]:
    """Shares of the time of a round's training by kind of operation."""
    from torch.profiler import ProfilerActivity, profile

    state, engine = second_state(ready), Simulation(ready)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        list(engine.train(state.broadcast, engine.clients))
        whole = time.perf_counter() - began
    found: dict[str, float] = dict.fromkeys([*KINDS.values(), "other operations"], 0.0)
    for event in seen.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for part, kind in KINDS.items() if part in name), "other operations")
        found[kind] += event.self_cpu_time_total / 1e6
    inside = sum(found.values())
    return {kind: spent / whole for kind, spent in found.items()} | {"Python, outside PyTorch": 1 - inside / whole}
