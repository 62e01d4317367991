"""A whole run: from a recipe to a run folder with an adapter in it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrot.core.errors import RunError
from fedrot.core.methods.base import ServerState
from fedrot.learning.models import ResidentModel
from fedrot.running import accounting
from fedrot.running.accounting import Accountant
from fedrot.running.checkpoint import Checkpoint, load_latest, load_round, save_checkpoint, saved_rounds
from fedrot.running.choices import described
from fedrot.running.engine import Engine
from fedrot.running.folder import RunFolder
from fedrot.running.prepare import Prepared, first_adapter, prepare, versions
from fedrot.running.recipe import Recipe
from fedrot.running.records import best_round
from fedrot.running.rounds import Watcher, play
from fedrot.running.simulation import Simulation
from fedrot.running.tracking import Trackers


@dataclass(frozen=True)
class Stage:
    """What the rounds of a run are played on."""

    recipe: Recipe  # with nothing left open
    engine: Engine
    model: ResidentModel
    identity: Mapping[str, Any]  # what must be the same for the run to be resumed
    files: Mapping[str, Any]  # name in the run folder -> what it says of those who take part
    how: str  # how the arithmetic is done, in a line for the log


def embedded(recipe: Recipe, folder: RunFolder) -> Stage:
    """Every client in this process."""
    ready = prepare(recipe)
    return divided_stage(ready, Simulation(ready), described(ready.recipe))


def divided_stage(ready: Prepared, engine: Engine, how: str) -> Stage:
    """The stage of a run whose examples are all read here and divided among the clients of `engine`."""
    partition = ready.partition
    counts = {split: partition.counts(split) for split in ready.encoded}
    indices = {s: {c: i.tolist() for c, i in partition.indices[s].items()} for s in ready.encoded}
    cut = {split: data.cut for split, data in ready.encoded.items()}
    found = {"labels": partition.strata.names, "label_counts": counts, "indices": indices, "cut": cut}
    return Stage(ready.recipe, engine, ready.model, ready.identity(), {"partition.json": found}, how)


def run(
    recipe: Recipe,
    out: Path,
    watcher: Watcher,
    resume: bool = False,
    open_stage: Callable[[Recipe, RunFolder], Stage] = embedded,
) -> RunFolder:
    """Run `recipe` in the folder `out`, or go on with the run that is there; `open_stage` says where clients are.

    Raises `FedrotError` with one line for whatever the user can mend; rounds that were finished stay on disk.
    """
    folder = RunFolder(out)
    if resume:
        recipe = folder.reopen(recipe)
    else:
        folder.refuse_existing()  # before anything slow is done
    try:
        accountant = Accountant(recipe) if recipe.privacy.mode != "none" else None  # refuses before anything slow
        stage = open_stage(recipe, folder)
        recipe, engine = stage.recipe, stage.engine
        spent = accountant.by_round(engine.clients, engine.held) if accountant else []
        checkpoint = _begin(folder, stage) if resume else None
        # The inputs are all read, and trackers reached, before anything is written.
        fresh = checkpoint or Checkpoint(recipe.method.start(first_adapter(recipe, stage.model)))
        trackers = Trackers(recipe, out)
        if not resume:
            folder.create(recipe)
        if checkpoint is None:
            _describe(folder, stage)
        checkpoint = fresh
        engine.restore(checkpoint.clients)
        folder.forget_metrics_from(checkpoint.rounds)
        keeper = _Keeper(folder, recipe, trackers, list(_scores(folder.metrics())))
        watcher.prepared(stage.how)
        if spent:
            watcher.prepared(accounting.described(recipe, spent))
        try:
            engine.begin(folder.metrics())
            last = play(recipe, engine, checkpoint.server, keeper, watcher)
        finally:
            keeper.trackers.close()
        if recipe.evaluation.choose == "best":
            last = _best(folder, engine, last)
        _finish(folder, recipe, engine, last, watcher)
    finally:
        folder.close()
    return folder


def _best(folder: RunFolder, engine: Engine, last: ServerState) -> ServerState:
    """The state after the round that scored best, with what clients kept then; the last where no score is a number."""
    best = best_round(folder.metrics())
    if best is None or best + 1 == last.broadcast.round:
        return last
    checkpoint = load_round(folder.checkpoints, best + 1)
    engine.restore(checkpoint.clients)
    return checkpoint.server


@dataclass
class _Keeper:
    """Keeps finished rounds: the line of metrics first, then the checkpoint that makes the round count."""

    folder: RunFolder
    recipe: Recipe
    trackers: Trackers
    scores: list[dict[str, Any]]  # of the rounds so far

    def save(self, record: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        self.folder.append_metrics(record)
        self.scores += _scores([record])
        chosen = best_round(self.scores) if self.recipe.evaluation.choose == "best" else None
        spare = None if chosen is None else chosen + 1
        save_checkpoint(self.folder.checkpoints, checkpoint, self.recipe.checkpoint.keep, spare)
        self.trackers.log(record)


def _scores(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is needed of the records to choose a round by."""
    return ({"round": r["round"], "evaluation": r["evaluation"]} for r in records if "evaluation" in r)


def _describe(folder: RunFolder, stage: Stage) -> None:
    """Write what the run works on, before its first round; versions.json last, which says that all is there."""
    for name, value in stage.files.items():
        folder.write_json(name, value)
    folder.write_json("versions.json", versions() | {"identity": stage.identity})


def _begin(folder: RunFolder, stage: Stage) -> Checkpoint | None:
    """The checkpoint to go on from, after making sure that model and data are those of the run."""
    described = folder.read_json("versions.json")
    if described is None:
        if saved_rounds(folder.checkpoints):
            raise RunError(f"{folder.path}: has checkpoints and no versions.json, which says what they belong to")
        return None
    for what, found in stage.identity.items():
        if described.get("identity", {}).get(what) != found:
            raise RunError(
                f"{folder.path}: the {what} is not what the run was started with (its hash differs); bring the old one "
                "back, or start another run by --out"
            )
    return load_latest(folder.checkpoints)


def _finish(folder: RunFolder, recipe: Recipe, engine: Engine, state: ServerState, watcher: Watcher) -> None:
    """Write the adapter, or one for each client with a head of its own, and the last scores."""
    chosen = state.broadcast.round - 1
    result: dict[str, Any] = {"rounds": recipe.rounds, "method": recipe.method.name, "round": chosen}
    record = folder.metrics()[chosen]
    if "evaluation" in record:
        result["evaluation"] = record["evaluation"]
    if "privacy" in record:
        result["privacy"] = {**record["privacy"], "rounds": chosen + 1, "stopped": chosen + 1 < recipe.rounds}
    if recipe.evaluation.final is not None:
        watcher.evaluating(recipe.evaluation.final)
        # Where problems are answered, the loss is that of the same problems.
        limit = recipe.evaluation.problems if recipe.evaluation.answers != "none" else None
        result["final"] = engine.evaluate(state.broadcast, recipe.evaluation.final, limit).record()
    if recipe.evaluation.answers != "none":
        split = recipe.evaluation.final or recipe.evaluation.split
        watcher.evaluating(split)
        result["answers"] = engine.answers(state.broadcast, split).record()
    state.broadcast.exported(state.broadcast.adapter).save(folder.adapter)
    if own := engine.finish(state.broadcast):
        for number, client in enumerate(engine.clients):
            state.broadcast.exported(own[client]).save(folder.path / "clients" / f"{number:03d}")
        folder.write_json("clients/names.json", {f"{n:03d}": name for n, name in enumerate(engine.clients)})
    folder.write_json("result.json", result)
