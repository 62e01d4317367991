"""Buffered asynchronous rounds and simulated time: by hand, against synchronous ones, cut off, and what is refused."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeEngine, Silent, first_adapter, go, outcome, poisoned
from tiny_runs import assert_near, begin, cut_and_resumed

from fedrot.core.adapter import Adapter
from fedrot.core.errors import RecipeError, RunError
from fedrot.core.methods import methods
from fedrot.core.methods.base import ServerState
from fedrot.running.clock import Clock, check_real, speed_of
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play, play_round

SIZES = {"a": 10, "b": 20, "c": 40, "d": 5}
# Ten steps each, so that rounds take 1, 2, 5.5 and 20 simulated seconds.
SPEEDS = {"a": 10.0, "b": 5.0, "c": 10 / 5.5, "d": 0.5}
# By hand for K = 2: (client -> rounds late, time) of every round. In the fourth, b trains from the third broadcast.
HEARD = [({"a": 0, "b": 0}, 2.0), ({"a": 0, "b": 0}, 4.0), ({"a": 0, "c": 2}, 5.5), ({"a": 0, "b": 1}, 6.5)]


class Slow(FakeEngine):
    """Every client takes ten steps; `sent` is what each trained from."""

    def __init__(self, recipe: Recipe, sizes: Mapping[str, int] = SIZES) -> None:
        super().__init__(recipe.method, sizes)
        self.sent: dict[tuple[int, str], Adapter] = {}

    def steps(self, client: str) -> int:
        return 10

    def local(self, broadcast: Any, client: str) -> Adapter:
        assert (broadcast.round, client) not in self.sent, "nobody trains twice from one broadcast"
        self.sent[broadcast.round, client] = broadcast.adapter
        return super().local(broadcast, client)


@pytest.fixture
def make(tiny_values: dict[str, Any]) -> Any:
    def recipe(*flags: str, method: str = "ffa", speeds: Mapping[str, float] = SPEEDS) -> Recipe:
        return parse_recipe({**tiny_values, "federation": {"speeds": dict(speeds)}}, ["--method.name", method, *flags])

    return recipe


def run(recipe: Recipe, engine: FakeEngine) -> tuple[ServerState, Silent]:
    seen = Silent()
    return play(recipe, engine, recipe.method.start(first_adapter()), seen, seen), seen


@pytest.mark.parametrize("staleness", ["none", "sqrt", "linear"])
def test_rounds_are_the_recurrence_by_hand(make: Any, staleness: str) -> None:
    recipe = make("--federation.buffer=2", f"--federation.staleness={staleness}", "--rounds=4")
    engine = Slow(recipe)
    state, seen = run(recipe, engine)
    assert [(r["clients"]["late"], r["clock"]) for r in seen.records] == HEARD
    assert [r["clients"]["used"] for r in seen.records] == [sorted(late) for late, _ in HEARD]

    counts = {"none": [1, 1, 1], "sqrt": [1, 2**-0.5, 3**-0.5], "linear": [1, 1 / 2, 1 / 3]}[staleness]
    current = {name: t.double() for name, t in first_adapter().tensors()}
    for number, (late, _) in enumerate(HEARD):
        total, step = sum(SIZES[client] for client in late), dict.fromkeys(current, 0.0)
        for client, tau in late.items():
            sent, local = dict(engine.sent[number - tau, client].tensors()), engine.locals[number - tau, client]
            for name, tensor in local.tensors():
                if not name.endswith("/a"):
                    step[name] += SIZES[client] / total * counts[tau] * (tensor.double() - sent[name].double())
        current = {name: t + step[name] for name, t in current.items()}
    assert_near({n: t.double() for n, t in state.broadcast.adapter.tensors()}, current, rel=1e-6)


@pytest.mark.parametrize("flags", [(), ("--federation.buffer=4",)])
def test_time_of_rounds_that_wait_for_all_is_the_slowest_clients(make: Any, flags: tuple[str, ...]) -> None:
    _, seen = run(recipe := make(*flags), Slow(recipe))
    assert [r["clock"] for r in seen.records] == [20.0, 40.0, 60.0]


def test_without_speeds_there_is_no_clock(tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values)
    state, seen = run(recipe, Slow(recipe))
    assert "clock" not in seen.records[0]
    assert not state.memory


def test_speeds_of_a_spread_are_log_normal_by_name(make: Any) -> None:
    recipe = make("--federation.spread=0.5")
    assert speed_of(recipe, "c") == SPEEDS["c"]
    logs = torch.tensor([speed_of(recipe, f"client-{i}") for i in range(1000)]).log()
    assert float(logs.mean()) == pytest.approx(0, abs=0.05)
    assert float(logs.std()) == pytest.approx(0.5, abs=0.05)
    assert speed_of(make(), "client-1") == 1.0


@pytest.mark.parametrize("method", ["fedit", "fedrot"])
def test_with_every_client_in_every_round_it_is_the_synchronous_run(
    method: str, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    flags = ("--method.name", method, '--federation.speeds={"books": 0.1, "films": 3}')
    one = outcome(go(tiny_values, tmp_path / "synchronous", *flags).path)
    other = outcome(go(tiny_values, tmp_path / "buffered", *flags, "--federation.buffer=3").path)
    assert [set(r["clients"].pop("late").values()) for r in other["metrics"]] == [{0}] * 3
    assert [r["clock"] for r in one["metrics"]] == pytest.approx([30.0, 60.0, 90.0])
    assert other == one


SLOW = ("--federation.buffer=2", '--federation.speeds={"films": 0.4}')
CASES: dict[str, tuple[str, ...]] = {
    "fedrot": SLOW,
    "one at once": (*SLOW, "--federation.concurrency=1"),
    "adam": (*SLOW, "--server.optimizer=adam", "--method.name=ffa"),
    "own heads, feedback": (*SLOW, "--lora.head=personal", "--federation.compression=int8"),
    "waiting for all": SLOW[1:],
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = cut_and_resumed(tiny_values, tmp_path, *CASES[case])
    assert resumed == whole
    assert [r["round"] for r in whole["metrics"]] == [0, 1, 2, 3]
    times = [r["clock"] for r in whole["metrics"]]
    assert times == sorted(set(times))
    late = [max(r["clients"].get("late", {"": 0}).values()) for r in whole["metrics"]]
    # Where all train at once, films is sent the first broadcast before the cut and heard after it.
    assert (late[2:] != [0, 0]) == (case not in ("one at once", "waiting for all"))


def test_a_client_that_comes_late_keeps_what_it_would(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *SLOW, "--lora.head=personal").play(2)
    assert set(tiny.engine.states()) == {"books", "music"}
    tiny.play()
    assert tiny.records[2]["clients"]["late"]["films"] == 2
    assert set(tiny.engine.states()) == {"books", "films", "music"}


def test_what_is_averaged_is_measured(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    """Of late uploads too: the server sends the mean of what they count as, before and after alignment."""
    flags = (*SLOW, "--method.strength=1", "--method.factor=joint", "--rounds=4")
    records = go(tiny_values, tmp_path / "run", *flags).metrics()
    assert any(max(r["clients"]["late"].values()) for r in records)
    for record in records:
        found = record["aggregation"]
        assert found["sent"] == pytest.approx(found["after"], rel=1e-4)
        assert (found["before"] == found["after"]) == (record["round"] == 0)


def test_a_late_upload_is_measured_though_its_own_round_was_not(tiny_values: dict[str, Any]) -> None:
    one, two = (begin(tiny_values, *SLOW, f"--diagnostics.every={n}").play(4).records[3] for n in (1, 3))
    assert set(one["clients"]["late"].values()) == {0, 1}
    assert one["aggregation"]["before"] != one["aggregation"]["after"]
    assert two["aggregation"] == one["aggregation"]


def test_no_more_clients_train_at_once_than_asked_and_all_get_their_turn(make: Any) -> None:
    recipe = make("--federation.buffer=2", "--federation.concurrency=3", "--rounds=1", speeds={})
    sizes = {f"client-{i}": 5 for i in range(8)}
    engine, heard = Slow(recipe, sizes), set()
    state = recipe.method.start(first_adapter())
    for _ in range(20):
        state, record = play_round(recipe, engine, state, Silent())
        flights = Clock.taken_from(state)[1].flights
        # The third trains on; who comes back in between leaves a place for one that waits.
        assert 1 <= len(flights) <= 3
        heard |= set(record["clients"]["used"])
    assert heard == set(sizes)
    assert sum(len(names) for names in engine.trained) == 40


@pytest.mark.parametrize(("fault", "reason"), [("power cut", "power cut"), (poisoned(float("nan")), "not finite")])
def test_a_failed_client_leaves_its_place_to_the_next(make: Any, fault: Any, reason: str) -> None:
    recipe = make("--federation.buffer=2", "--rounds=4")
    engine = Slow(recipe)
    engine.faults["b"] = fault
    _, seen = run(recipe, engine)
    first, *_, last = seen.records
    assert reason in first["clients"]["dropped"]["b"]
    assert (first["clients"]["used"], first["clients"]["drawn"], first["clock"]) == (["a", "c"], 3, 5.5)
    assert last["clients"]["used"]
    # Late uploads are checked as others are.
    engine = Slow(recipe)
    engine.faults["c"] = fault
    _, seen = run(recipe, engine)
    assert reason in seen.records[2]["clients"]["dropped"]["c"]
    assert seen.records[2]["clients"]["late"] == {"a": 0, "b": 0}


def test_where_every_client_was_heard_the_round_ends_and_the_quorum_decides(make: Any) -> None:
    flags = ("--federation.buffer=4", "--rounds=2")
    recipe = make(*flags, "--federation.quorum=0.75")

    def failing() -> FakeEngine:
        engine = Slow(recipe)
        engine.faults["b"] = "power cut"
        return engine

    state, _ = run(recipe, failing())
    without = make("--federation.buffer=3", "--rounds=2")
    expected, _ = run(without, Slow(without, {c: n for c, n in SIZES.items() if c != "b"}))
    assert_near(dict(state.broadcast.adapter.tensors()), dict(expected.broadcast.adapter.tensors()), rel=0)
    with pytest.raises(RunError, match=r"3 of 4 uploads were usable, the quorum is 4 .*b: power cut"):
        run(make(*flags, "--federation.quorum=1"), failing())


def test_every_method_whose_changes_add_up_is_taken_and_no_other(tiny_values: dict[str, Any]) -> None:
    values = parse_recipe({**tiny_values, "federation": {"buffer": 2}}).to_dict()
    for name in methods():
        asked = {**values, "method": {"name": name}}
        if name in ("fedit", "fedrot", "ffa"):
            assert Recipe.from_values(asked).federation.buffer == 2
            continue
        with pytest.raises(RecipeError, match=rf"federation\.buffer: method {name} does not .*: fedit, fedrot or ffa$"):
            Recipe.from_values(asked)


PRIVATE = ("--privacy.mode=local", "--privacy.clip=1", "--privacy.noise=1", "--privacy.delta=0.01")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--federation.participation=0.5"], r"federation\.participation: with .* federation\.concurrency"),
        (["--lora.ranks={books: 1}"], r"lora\.ranks: with federation\.buffer, "),
        (["--local.scaffold=true"], r"local\.scaffold: with federation\.buffer, "),
        (["--robust.rule=norm"], r"robust\.rule: with federation\.buffer, "),
        ([*PRIVATE, "--federation.weighting=uniform"], r"privacy\.mode: with federation\.buffer, "),
        (["--federation.buffer=null", "--federation.concurrency=2"], r"federation\.concurrency: it is for "),
        (["--federation.buffer=0"], r"federation\.buffer must be at least 1, or null, got 0"),
        (["--federation.concurrency=0"], r"federation\.concurrency must be at least 1"),
        (["--federation.speeds={books: 0}"], r"federation\.speeds must be positive, each"),
        (["--federation.spread=-1"], r"federation\.spread must be from 0 to 10"),
        (["--federation.staleness=cubic"], r"federation\.staleness must be linear, none or sqrt"),
    ],
)
def test_what_does_not_work_is_refused(flags: list[str], message: str, tiny_values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**tiny_values, "federation": {"buffer": 2}}, flags)


def test_clients_that_there_are_not_are_refused(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"federation\.speeds: there is no client 'x'; the clients are books, films"):
        go(tiny_values, tmp_path / "run", "--federation.speeds={x: 1}")
    with pytest.raises(RecipeError, match=r"federation\.buffer is 4, and each of the 3 clients uploads once"):
        go(tiny_values, tmp_path / "run", "--federation.buffer=4")


@pytest.mark.parametrize("key", ["speeds", "spread"])
def test_clients_at_sites_of_their_own_have_no_simulated_time(key: str, tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values, [f"--federation.{key}={'{books: 2}' if key == 'speeds' else 1}"])
    for refused in (lambda: check_real(recipe), lambda: run(recipe, FakeEngine(recipe.method, SIZES))):
        with pytest.raises(RecipeError, match=rf"federation\.{key}: time is simulated .* not between sites"):
            refused()
    check_real(parse_recipe(tiny_values, ["--federation.buffer=2"]))


def test_an_engine_without_time_has_no_buffer(tiny_values: dict[str, Any]) -> None:
    recipe = parse_recipe(tiny_values, ["--federation.buffer=2"])
    with pytest.raises(RecipeError, match=r"federation\.buffer: this engine hears its clients all together"):
        run(recipe, FakeEngine(recipe.method, SIZES))


def test_a_clock_comes_back_from_memory_bit_for_bit(make: Any) -> None:
    recipe = make("--federation.buffer=1", "--federation.spread=1", "--rounds=5", speeds={})
    state, _ = run(recipe, Slow(recipe, {f"site/{i}": 3 for i in range(6)}))
    bare, clock = Clock.taken_from(state)
    assert not bare.memory
    assert (len(clock.flights), clock.sent) == (5, 10)
    assert set(clock.older) == {flight.round for flight in clock.flights.values()}
    again = clock.put_in(bare)
    assert again.memory.keys() == state.memory.keys()
    assert all(torch.equal(again.memory[name], t) for name, t in state.memory.items())
    for number, other in itertools.pairwise(sorted(clock.older)):
        assert not torch.equal(clock.older[number].layers["x"].b, clock.older[other].layers["x"].b)
