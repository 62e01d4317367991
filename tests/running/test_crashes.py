"""A server and sites killed at every file operation, and at random: the run ends as if nothing had happened."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from fakes import Silent, outcome
from mortal import Crash, Disk, MortalPost, on
from network_sites import ONE_BY_ONE, divide_files, values_of

from fedrot import running
from fedrot.core.adapter import Adapter
from fedrot.core.methods.base import Broadcast
from fedrot.learning.evaluation import Evaluation
from fedrot.running.checkpoint import load_round, saved_rounds
from fedrot.running.client import Round
from fedrot.running.engine import Failure
from fedrot.running.folder import RunFolder
from fedrot.running.network import opening, site
from fedrot.running.network.journal import read_exchanges
from fedrot.running.network.opening import between_sites
from fedrot.running.prepare import Prepared, prepare_site
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.run import run
from fedrot.running.simulation import Simulation

# What is kept: by the server Adam's moments and the best round, by sites what int8 lost, or factors of their own.
SHARED = ("--server.optimizer", "adam", "--federation.compression", "int8", "--checkpoint.keep", "1")
BEST = ("--evaluation.choose", "best")
PERSONAL = ("--method.name", "fedsa")
SECURE = ("--secure.aggregation", "true")  # and which sums a site helped to open


class Remembered(Simulation):
    """Computes nothing anew from what it was computed from before: a run costs what its files and messages cost."""

    results: ClassVar[dict[object, Any]] = {}

    def rounds(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[tuple[str, Round | Failure]]:
        compute = super().rounds
        yield from self._once(lambda: list(compute(broadcast, clients)), broadcast, *clients)

    def evaluate(self, broadcast: Broadcast, split: str, limit: int | None = None) -> Evaluation:
        compute = super().evaluate
        found: Evaluation = self._once(lambda: compute(broadcast, split, limit), broadcast, split, limit)
        return found

    def _once(self, compute: Callable[[], Any], broadcast: Broadcast, *asked: object) -> Any:
        sent = (broadcast.adapter, broadcast.reference, broadcast.base_delta, broadcast.base_step, broadcast.variate)
        tensors = [tensor for adapter in sent if adapter is not None for _, tensor in adapter.tensors()]
        tensors += [state[name] for state in self.states().values() for name in sorted(state)]
        made_of = (repr(self._recipe), broadcast.round, *self.clients, *asked, *(t.numpy().tobytes() for t in tensors))
        if made_of not in self.results:
            self.results[made_of] = compute()
        return self.results[made_of]


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Recipes, models, data and versions are read once, however often a process is started."""
    loaded: dict[str, Any] = {}

    def once(load: Callable[..., Any]) -> Callable[..., Any]:
        def found(*of: Any, **by: Any) -> Any:
            key = f"{load.__name__} {of!r} {by!r}"
            if key not in loaded:
                loaded[key] = load(*of, **by)
            return loaded[key]

        return found

    def fresh(prepare: Callable[..., Prepared]) -> Callable[..., Prepared]:
        first: dict[int, Adapter] = {}

        def found(*of: Any) -> Prepared:  # a process that has just started has what was loaded in its model
            ready = prepare(*of)
            ready.model.change_base(None)
            ready.model.write(first.setdefault(id(ready), ready.model.read()))
            return ready

        return found

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (opening, "load_model"),
            (site, "parse_recipe"),
            (running.run, "versions"),
            (running.folder, "to_yaml"),
            (yaml, "safe_load"),
        ):
            patch.setattr(module, name, once(getattr(module, name)))
        patch.setattr(site, "prepare_site", fresh(once(prepare_site)))
        patch.setattr(site, "Simulation", Remembered)
        yield
    Remembered.results.clear()


@dataclass
class Deployment:
    """Runs of one recipe between sites, each in folders of its own."""

    recipe: Recipe
    data: dict[str, Path]
    folder: Path
    number: Iterator[int] = field(default_factory=count)

    def play(self, mortal: Sequence[str], lives: Iterable[int] = ()) -> tuple[Disk, dict[str, Any]]:
        """A run in which processes die, and what it leaves: of `server` and `sites` those that are mortal, after so
        many steps each. Whoever dies is started again, as `fedrot server --resume` and a site's keeper do.
        """
        here = self.folder / f"{next(self.number)}"
        disk = Disk(here, iter(lives))
        post = MortalPost(self.data, here / "memory", disk, "sites" in mortal)
        with on(disk), disk.process("server", "server" in mortal):
            while True:
                try:
                    made = self._serve(here / "out", post)
                    break
                except Crash:
                    disk.start()
                except Exception as problem:
                    problem.add_note(f"after deaths before {disk.deaths}")
                    raise
        return disk, self._left(made, post)

    def _serve(self, out: Path, post: MortalPost) -> RunFolder:
        resume = (out / "recipe.yaml").exists()
        return run(self.recipe, out, Silent(), resume, between_sites(post, list(self.data), wait=0.0))

    def _left(self, made: RunFolder, post: MortalPost) -> dict[str, Any]:
        """The run's outcome, and every site's files."""
        assert read_exchanges(made.path)  # can be read, though lines may be lost
        folders = {name: post.memory / name / made.read_json("sites.json")["run"] for name in self.data}
        sites = {
            name: {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
            for name, folder in folders.items()
        }
        kept = [load_round(made.checkpoints, int(path.name[-6:])).rounds for path in saved_rounds(made.checkpoints)]
        last = (made.checkpoints / f"round-{kept[-1]:06d}" / "state.safetensors").read_bytes()
        # One more checkpoint may be kept, but all of them are whole.
        files = {str(path.relative_to(made.path)) for path in made.path.rglob("*") if "round-" not in str(path)}
        return outcome(made.path) | {"sites": sites, "files": files, "checkpoint": last}


@pytest.fixture
def deployment(tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path) -> Callable[..., Deployment]:
    """Makes one of a recipe with these flags."""
    folders = divide_files(tiny_data, tmp_path / "sites")

    def made(*flags: str, sites: int = 2) -> Deployment:
        values = values_of(
            tiny_values,
            data={"labels": ["negative", "positive"], "path": None},
            partition={"kind": "iid", "clients": sites},
            local={"steps": 1},
        )
        recipe = parse_recipe(values, (*ONE_BY_ONE, *flags))
        return Deployment(recipe, {name: folders[name] for name in sorted(folders)[:sites]}, tmp_path)

    return made


@pytest.mark.parametrize(
    ("mortal", "flags"), [("server", (*SHARED, "--rounds", "2")), ("sites", PERSONAL)], ids=["server", "sites"]
)
def test_a_death_before_any_step_changes_nothing(
    mortal: str, flags: tuple[str, ...], deployment: Callable[..., Deployment]
) -> None:
    """Every file that is opened, written to, flushed, renamed or removed, and every message that comes."""
    there = deployment(*flags)
    alive, whole = there.play([mortal])
    names = whole["files"] if mortal == "server" else {name for files in whole["sites"].values() for name in files}
    assert [name for name in names if not any(Path(name).name in step for step in alive.steps)] == []
    for at in range(len(alive.steps)):
        disk, found = there.play([mortal], [at])
        assert len(disk.deaths) == 1
        assert found == whole, f"after a death before {disk.deaths}"


@pytest.mark.parametrize(
    ("mortal", "flags", "kills"),
    [(["server", "sites"], (*SHARED, *BEST), 150), (["server"], SECURE, 30)],
    ids=["150 of all", "30 of the server"],
)
def test_random_deaths_change_nothing(
    mortal: list[str], flags: tuple[str, ...], kills: int, deployment: Callable[..., Deployment]
) -> None:
    """Up to twelve in a run. A site that dies within a secure sum is lost for it, so there the server alone does."""
    there, rng = deployment(*flags, sites=3 if flags == SECURE else 2), random.Random(0)
    _, whole = there.play([])
    deaths: list[str] = []
    while len(deaths) < kills:
        disk, found = there.play(mortal, [rng.randrange(80) for _ in range(min(12, kills - len(deaths)))])
        assert found == whole, f"after deaths before {disk.deaths}"
        deaths += disk.deaths
    assert len(deaths) == kills
