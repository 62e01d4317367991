"""The second question of a round (FedASK): what the answers make, which are left out and why, order, bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import FakeEngine, Silent, first_adapter, poisoned
from tiny_runs import assert_equal, begin

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.errors import RunError
from fedrot.core.methods.base import Broadcast, ServerState, Upload
from fedrot.running.engine import Failure
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play, play_round

SIZES = {"a": 10, "b": 20, "c": 40, "d": 5}
Answer = Upload | Failure


class Asked(FakeEngine):
    """Clients that answer from what they trained. `spoil` turns their answers into what arrives."""

    def __init__(self, recipe: Recipe, sizes: Mapping[str, int] = SIZES) -> None:
        super().__init__(recipe.method, sizes)
        self.round = 0
        self.asked: list[list[str]] = []
        self.questions: list[Adapter] = []
        self.spoil: Callable[[list[Answer]], list[Answer]] = lambda answers: answers

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Answer]:
        self.round = broadcast.round
        return super().train(broadcast, clients)

    def answer(self, question: Adapter, clients: Sequence[str]) -> Iterator[Answer]:
        self.asked.append(list(clients))
        self.questions.append(question)
        answers: list[Answer] = []
        for name in clients:
            adapter = self.method.answer(self.locals[self.round, name], question)
            answers.append(Upload(name, adapter, self.sizes[name], 1, metrics={"loss": 1.0, "steps": 1, "tokens": 1}))
        yield from self.spoil(answers)


@pytest.fixture
def recipe(tiny_values: dict[str, Any]) -> Recipe:
    return parse_recipe(tiny_values, ["--method.name", "fedask", "--rounds", "2"])


def spoiled(client: str, change: Callable[[Upload], Answer]) -> Callable[[list[Answer]], list[Answer]]:
    """Change one client's answer."""
    return lambda answers: [change(a) if a.client == client and isinstance(a, Upload) else a for a in answers]


def dense(recipe: Recipe, engine: Asked, number: int, start: Adapter, answering: Sequence[str]) -> Adapter:
    """Q Q^T sum p_i s B_i A_i over those who answer, Q spanning (sum p_i s B_i A_i) A^T over all."""
    layers = {}
    for name, pair in start.layers.items():
        products = {c: engine.locals[number, c].layers[name] for c in SIZES}
        updates = {c: p.scale * p.b.double() @ p.a.double() for c, p in products.items()}
        total = sum(SIZES[c] * updates[c] for c in SIZES) / sum(SIZES.values())
        part = sum(SIZES[c] * updates[c] for c in answering) / sum(SIZES[c] for c in answering)
        q, _ = torch.linalg.qr(total @ pair.a.double().T)
        layers[name] = LoraPair(torch.eye(pair.a.shape[1], dtype=torch.float64), q @ (q.T @ part), 1.0)
    return Adapter(layers)


def assert_updates(found: Adapter, wanted: Adapter) -> None:
    """The same s B A."""
    for name, pair in wanted.layers.items():
        torch.testing.assert_close(found.layers[name].delta().double(), pair.delta(), rtol=1e-4, atol=1e-5)


def first_round(recipe: Recipe, engine: Asked) -> tuple[ServerState, dict[str, Any], Silent]:
    seen = Silent()
    state, record = play_round(recipe, engine, recipe.method.start(first_adapter()), seen)
    return state, record, seen


def test_two_rounds_are_the_dense_sketch(recipe: Recipe) -> None:
    engine, start = Asked(recipe), first_adapter()
    state = recipe.method.start(start)
    for number in range(2):
        state, record = play_round(recipe, engine, state, Silent())
        assert record["clients"]["dropped"] == {}
        assert_updates(state.broadcast.adapter, dense(recipe, engine, number, start, sorted(SIZES)))
        heads = [(SIZES[c], engine.locals[number, c].head["classifier.weight"].double()) for c in SIZES]
        mean = sum(size * head for size, head in heads) / sum(SIZES.values())
        torch.testing.assert_close(
            state.broadcast.adapter.head["classifier.weight"].double(), mean, rtol=1e-5, atol=1e-6
        )
        start = state.broadcast.adapter


def widened(upload: Upload) -> Upload:
    """An answer of one column more than asked for."""
    pair = upload.adapter.layers["x"]
    wide = LoraPair(torch.zeros(pair.rank, pair.a.shape[1] + 1), pair.b, pair.scale)
    return replace(upload, adapter=replace(upload.adapter, layers={**upload.adapter.layers, "x": wide}))


FAULTS: dict[str, tuple[Callable[[Upload], Answer], str]] = {
    "failed": (lambda u: Failure(u.client, "power cut"), "power cut"),
    "not a number": (poisoned(float("nan")), "layers/x/a holds values that are not finite"),
    "infinite": (poisoned(float("inf")), "not finite"),
    "other shape": (widened, "layers/x/a has shape (2, 8)"),
    "a layer missing": (lambda u: replace(u, adapter=replace(u.adapter, layers={"x": u.adapter.layers["x"]})), "'y'"),
    "other dtype": (lambda u: replace(u, adapter=u.adapter.map(torch.Tensor.double)), "dtype torch.float64"),
    "a rotation": (lambda u: replace(u, rotation={"x": torch.eye(2)}), "rotations"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_an_unusable_answer_is_left_out_with_its_reason(case: str, recipe: Recipe) -> None:
    change, reason = FAULTS[case]
    engine = Asked(recipe)
    engine.spoil = spoiled("b", change)
    state, record, _ = first_round(recipe, engine)
    assert list(record["clients"]["dropped"]) == ["b"]
    assert record["clients"]["dropped"]["b"].startswith("second phase: ")
    assert reason in record["clients"]["dropped"]["b"]
    assert_updates(state.broadcast.adapter, dense(recipe, engine, 0, first_adapter(), ["a", "c", "d"]))


def test_a_missing_answer_is_left_out(recipe: Recipe) -> None:
    engine = Asked(recipe)
    engine.spoil = lambda answers: [a for a in answers if a.client != "c"]
    state, record, _ = first_round(recipe, engine)
    assert record["clients"]["dropped"] == {"c": "second phase: gave no answer"}
    assert_updates(state.broadcast.adapter, dense(recipe, engine, 0, first_adapter(), ["a", "b", "d"]))


def test_only_those_whose_upload_was_taken_are_asked(recipe: Recipe) -> None:
    engine = Asked(recipe)
    engine.faults["b"] = poisoned(float("nan"))
    engine.faults["d"] = "out of memory"
    _, record, _ = first_round(recipe, engine)
    assert engine.asked == [["a", "c"]]
    assert record["clients"]["used"] == ["a", "c"] == engine.accepted
    assert not any(reason.startswith("second phase") for reason in record["clients"]["dropped"].values())


def test_without_a_usable_answer_the_run_stops_at_the_last_good_state(recipe: Recipe) -> None:
    engine, seen = Asked(recipe), Silent()
    start = recipe.method.start(first_adapter())
    good, _ = play_round(recipe, Asked(recipe), start, Silent())
    checkpoints: list[Any] = []

    class Breaks(Silent):
        def save(self, record: Mapping[str, Any], checkpoint: Any) -> None:
            super().save(record, checkpoint)
            checkpoints.append(checkpoint)
            engine.spoil = lambda answers: [Failure(a.client, "power cut") for a in answers]

    store = Breaks()
    with pytest.raises(RunError, match="round 1: no answer of the second phase was usable") as caught:
        play(recipe, engine, start, store, seen)
    assert "\n" not in str(caught.value)
    assert [record["round"] for record in store.records] == [0]
    assert_equal(checkpoints[-1].server.broadcast.adapter, good.broadcast.adapter)


def reversed_with_noise(answers: list[Answer]) -> list[Answer]:
    """Last first, each twice, and one of a stranger."""
    again = [poisoned(9.0)(a) if isinstance(a, Upload) else a for a in answers]
    return [Failure("z", "?"), *reversed(answers), *again]


def test_the_order_of_answers_changes_no_bit_and_repeated_ones_are_passed_over(recipe: Recipe) -> None:
    plain = first_round(recipe, Asked(recipe))
    engine = Asked(recipe)
    engine.spoil = reversed_with_noise
    mixed = first_round(recipe, engine)
    assert_equal(mixed[0].broadcast.adapter, plain[0].broadcast.adapter)
    assert mixed[1]["bytes"] == plain[1]["bytes"]
    assert mixed[1]["clients"] == plain[1]["clients"]


def test_of_an_answer_nothing_counts_but_what_was_asked_for(recipe: Recipe) -> None:
    """Not its copy of the question, not its head, not the weight that it claims now."""
    plain, engine = first_round(recipe, Asked(recipe)), Asked(recipe)

    def lying(upload: Upload) -> Upload:
        layers = {n: replace(p, b=p.b + 7) for n, p in upload.adapter.layers.items()}
        head = {n: t - 3 for n, t in upload.adapter.head.items()}
        return replace(upload, adapter=replace(upload.adapter, layers=layers, head=head), held=10**6, used=10**6)

    engine.spoil = spoiled("d", lying)
    assert_equal(first_round(recipe, engine)[0].broadcast.adapter, plain[0].broadcast.adapter)


def test_bytes_of_both_phases_are_counted(recipe: Recipe) -> None:
    start = first_adapter()
    part = {name: start.bytes(frozenset({name})) for name in ("a", "b", "head")}
    everything = sum(part.values())
    _, record, _ = first_round(recipe, Asked(recipe))
    assert record["bytes"] == {"down": 4 * (everything + part["b"]), "up": 4 * everything}
    engine = Asked(recipe)
    engine.faults["a"] = "out of memory"
    engine.spoil = spoiled("b", poisoned(float("nan")))
    _, record, _ = first_round(recipe, engine)
    # Three are asked, two of them answer usably.
    up = 3 * (part["b"] + part["head"]) + 2 * part["a"]
    assert record["bytes"] == {"down": 4 * everything + 3 * part["b"], "up": up}


def test_the_question_is_orthonormal_and_common(recipe: Recipe) -> None:
    engine = Asked(recipe)
    first_round(recipe, engine)
    assert len(engine.questions) == 1
    for pair in engine.questions[0].layers.values():
        torch.testing.assert_close(pair.b.T @ pair.b, torch.eye(2), rtol=0, atol=1e-5)


def test_simulated_clients_answer_from_what_they_trained(tiny_values: dict[str, Any]) -> None:
    """In the embedded engine; an upload is a sketch, an answer is not one of it."""
    tiny = begin(tiny_values, "--method.name", "fedask")
    first = tiny.adapter
    trained = {name: tiny.client(name).trained for name in tiny.engine.clients}
    tiny.play()
    for name, pair in tiny.adapter.layers.items():
        update = sum(t.layers[name].delta().double() for t in trained.values()) / 3
        q, _ = torch.linalg.qr(update @ first.layers[name].a.double().T)
        torch.testing.assert_close(pair.delta().double(), q @ (q.T @ update), rtol=1e-3, atol=1e-6)
    assert tiny.records[0]["bytes"]["up"] == 3 * tiny.adapter.bytes()
    assert "aggregation" not in tiny.records[0]
    assert tiny.records[0]["drift"]["layers"].keys() == tiny.adapter.layers.keys()
