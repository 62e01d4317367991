"""A simulated round against the published way, its parts one by one, and the price of alignment."""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from fedrot.core.methods import get_method
from fedrot.core.methods.base import ServerState
from fedrot.learning.capacity import fast_bfloat16
from fedrot.running.checkpoint import Checkpoint, save_checkpoint
from fedrot.running.prepare import Prepared
from fedrot.running.rounds import play_round
from fedrot.running.simulation import Simulation
from published_loop import PublishedLoop
from recipes import BUILD
from table import Quiet, Result, in_turns, ratio

PHASES = ("align", "check", "aggregate", "diagnose", "checkpoint")


def way(ready: Prepared, method: str | None = None, precision: str = "fp32", **compute: Any) -> Prepared:
    """The same recipe with other settings of the arithmetic, or another method."""
    recipe = replace(ready.recipe, compute=replace(ready.recipe.compute, **compute))
    recipe = replace(recipe, local=replace(recipe.local, precision=precision))  # type: ignore[arg-type]
    return replace(ready, recipe=replace(recipe, method=get_method(method)()) if method else recipe)


def second_state(ready: Prepared) -> ServerState:
    """The state after a round: round 1 is the first that rotates, from factors that have moved."""
    engine, start = Simulation(ready), ready.recipe.method.start(ready.model.read())
    return play_round(ready.recipe, engine, start, Quiet())[0]


def one_round(ready: Prepared, state: ServerState, records: list[dict[str, Any]]) -> Callable[[], None]:
    """A round with its checkpoint and without evaluation; its record goes into `records`."""
    engine = Simulation(ready)

    def run() -> None:
        new, record = play_round(ready.recipe, engine, state, Quiet())
        began = time.perf_counter()
        save_checkpoint(BUILD / "bench-checkpoints", Checkpoint(new), keep=1)
        record["seconds"]["checkpoint"] = time.perf_counter() - began
        records.append(record)

    return run


def one_evaluation(ready: Prepared, state: ServerState) -> Callable[[], object]:
    """The evaluation of a round."""
    engine, settings = Simulation(ready), ready.recipe.evaluation
    return lambda: engine.evaluate(state.broadcast, settings.split, settings.limit)


def against_published(ready: Prepared, repeats: int) -> list[Result]:
    """Each step from the published way to ours, in CPU time, with and without evaluation."""
    state = second_state(ready)
    loop = PublishedLoop(ready, state.broadcast)
    steps = {
        "length grouping": way(ready, stack=1, packing=False),
        "and packing": way(ready, stack=1, packing=True),
        "and stacking": way(ready, packing=True),
    }
    if fast_bfloat16("cpu"):
        steps["and bf16"] = way(ready, packing=True, precision="bf16")
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    ways: dict[str, Callable[[], object]] = {"published": loop.round, "published evaluation": loop.evaluate}
    for name, made in steps.items():
        ways |= {name: one_round(made, state, records[name]), f"{name} evaluation": one_evaluation(made, state)}
    times = in_turns(ways, repeats)
    whole = {
        name: [a + b for a, b in zip(times[name], times[f"{name} evaluation"], strict=True)]
        for name in ("published", *steps)
    }
    last = list(steps)[-1]
    results = [
        Result(
            "1. published way / ours, a round with evaluation, CPU time",
            ratio(whole["published"], whole[last]),
            "x",
            15,
            True,
        ),
        Result("1. the same without evaluation", ratio(times["published"], times[last]), "x", 15, True),
    ]
    for name in steps:
        results.append(Result(f"1. of it with {name}", ratio(whole["published"], whole[name]), "x"))
    seconds = {phase: median(r["seconds"].get(phase, 0.0) for r in records[last]) for phase in PHASES}
    beyond = sum(seconds.values()) / len(ready.partition.clients)
    results.append(Result("1. beyond training and evaluation, a client and round", 1000 * beyond, "ms", 20.0))
    share = 100 * seconds["diagnose"] / median(times[last])
    results.append(Result("1. diagnostics, of a round without evaluation", share, "%", 2.0))
    if "and bf16" not in steps:
        print("bf16 is not measured: this processor has neither AMX nor AVX512_BF16, so it is slower than fp32 here")
    return results


def language_model(ready: Prepared, repeats: int) -> list[Result]:
    """A language model's round, a problem a step: the published way pads every problem to the longest allowed."""
    state = second_state(ready)
    loop = PublishedLoop(ready, state.broadcast, length=ready.recipe.data.max_length)
    ours, records = way(ready), list[dict[str, Any]]()
    ways: dict[str, Callable[[], object]] = {
        "published": loop.round,
        "published evaluation": loop.evaluate,
        "ours": one_round(ours, state, records),
        "our evaluation": one_evaluation(ours, state),
    }
    times = in_turns(ways, repeats)
    both = [
        [a + b for a, b in zip(times[one], times[other], strict=True)]
        for one, other in (("published", "published evaluation"), ("ours", "our evaluation"))
    ]
    data = ready.encoded["train"]
    what = "GSM8K" if ready.recipe.data.source == "gsm8k" else "HumanEval's problems"
    return [
        Result(f"1. published way / ours, SmolLM2 on {what}, batch 1, with evaluation", ratio(*both), "x", 5, True),
        Result("1. the same, SmolLM2, without evaluation", ratio(times["published"], times["ours"]), "x", 5, True),
        Result("1. tokens of a problem, mean", float(data.lengths.mean()), "tokens"),
    ]


def price_of_alignment(ready: Prepared, repeats: int) -> list[Result]:
    """FedIT's and FedRot's rounds in turns."""
    state = second_state(way(ready, "fedrot"))
    records: dict[str, list[dict[str, Any]]] = {"fedit": [], "fedrot": []}
    times = in_turns({n: one_round(way(ready, n), state, records[n]) for n in records}, repeats)
    shares = [100 * r["seconds"]["align"] / r["seconds"]["round"] for r in records["fedrot"]]
    return [
        Result("5. alignment, of FedRot's round without evaluation", median(shares), "%", 1.0),
        Result("5. FedRot's round / FedIT's, CPU time", ratio(times["fedrot"], times["fedit"]), "x"),
    ]
