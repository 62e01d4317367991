"""Scores of an adapter: those of a plain loop, whole and by client, whatever the order and the batch."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import encoded_splits, quick, resident, seeds, shaken

from fedrot.core.adapter import Adapter
from fedrot.learning.encoding import Encoded
from fedrot.learning.evaluation import Evaluation, How, Piece, Spread, chosen_rows, evaluate, measure
from fedrot.learning.models import ResidentModel
from fedrot.learning.tasks.classification import score


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ResidentModel:
    return resident(tiny_model, dropout=0.5)


@pytest.fixture(scope="module")
def adapters(model: ResidentModel) -> dict[str, Adapter]:
    """One adapter a client, all with both labels among their predictions."""
    return {name: shaken(model.read(), seed, size=0.5) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def data(model: ResidentModel, tiny_data: Path) -> Encoded:
    return encoded_splits(model, tiny_data)["test"]


@pytest.fixture(scope="module")
def parts(data: Encoded) -> dict[str, np.ndarray]:
    """Three clients of different sizes whose places are mixed."""
    places = np.random.default_rng(0).permutation(len(data))
    return {"a": np.sort(places[:30]), "b": np.sort(places[30:50]), "c": np.sort(places[50:])}


def plain(model: ResidentModel, adapter: Adapter, data: Encoded, rows: np.ndarray) -> list[tuple[int, int, float]]:
    """(prediction, label, loss) of each row, by itself."""
    model.write(adapter)
    found = []
    for row in rows:
        inputs, labels = data.batch([row])
        with torch.no_grad():
            logits = model.model(**inputs).logits[0].double()
        label = int(labels[0])
        found.append((int(logits.argmax()), label, -float(logits.log_softmax(-1)[label])))
    return found


def scores_of(found: list[tuple[int, int, float]]) -> dict[str, float]:
    """Accuracy, macro F1 and mean loss by their definitions."""
    f1 = []
    for label in {label for guess, truth, _ in found for label in (guess, truth)}:
        hits = sum(guess == truth == label for guess, truth, _ in found)
        named = sum((guess == label) + (truth == label) for guess, truth, _ in found)
        f1.append(2 * hits / named)
    right = sum(guess == truth for guess, truth, _ in found)
    return {
        "accuracy": right / len(found),
        "macro_f1": sum(f1) / len(f1),
        "loss": sum(loss for *_, loss in found) / len(found),
    }


def near(wanted: dict[str, float]) -> object:
    """These scores, up to float32's rounding."""
    return pytest.approx(wanted, rel=1e-4)


def alone(model: ResidentModel) -> Spread:
    """All pieces on one model."""

    def spread(work: Callable[[ResidentModel, Piece], torch.Tensor], pieces: Sequence[Piece]) -> Iterable[torch.Tensor]:
        return (work(model, piece) for piece in pieces)

    return spread


def everything(data: Encoded) -> np.ndarray:
    """Every row of the split."""
    return chosen_rows(len(data), None, 0, "test")


def test_scores_are_those_of_a_plain_loop_whole_and_by_client(
    model: ResidentModel, adapters: dict[str, Adapter], data: Encoded, parts: dict[str, np.ndarray]
) -> None:
    found = evaluate(alone(model), {"": adapters["a"]}, data, "test", parts, everything(data), How(7))
    reference = plain(model, adapters["a"], data, everything(data))
    assert len({guess for guess, *_ in reference}) == 2
    assert found.scores == near(scores_of(reference))
    assert (found.split, found.examples, found.model) == ("test", 60, "global")
    assert list(found.clients) == ["a", "b", "c"]
    for client, places in parts.items():
        assert found.clients[client] == near(scores_of([reference[place] for place in places]))


def test_personal_adapters_are_scored_on_their_own_rows(
    model: ResidentModel, adapters: dict[str, Adapter], data: Encoded, parts: dict[str, np.ndarray]
) -> None:
    found = evaluate(alone(model), adapters, data, "test", parts, everything(data), How(16))
    reference = {client: plain(model, adapters[client], data, places) for client, places in parts.items()}
    assert found.model == "personal"
    for client, own in reference.items():
        assert found.clients[client] == near(scores_of(own))
    assert found.scores == near(scores_of([row for own in reference.values() for row in own]))
    shared = evaluate(alone(model), {"": adapters["a"]}, data, "test", parts, everything(data), How(16))
    assert found.clients["a"] == near(dict(shared.clients["a"]))
    assert found.clients["b"]["loss"] != pytest.approx(shared.clients["b"]["loss"], rel=1e-3)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_neither_the_batch_nor_the_order_of_rows_changes_a_prediction(
    model: ResidentModel, adapters: dict[str, Adapter], data: Encoded, batch: int
) -> None:
    rows = np.random.default_rng(batch).permutation(len(data))[:40]
    predicted, losses = measure(model, adapters["a"], data, rows, How(batch)).T
    reference = plain(model, adapters["a"], data, rows)
    assert predicted.tolist() == [guess for guess, *_ in reference]
    torch.testing.assert_close(losses.double(), torch.tensor([r[2] for r in reference]).double(), rtol=1e-4, atol=1e-6)


def test_what_ran_before_does_not_matter(
    model: ResidentModel, adapters: dict[str, Adapter], data: Encoded, parts: dict[str, np.ndarray]
) -> None:
    def scored(client: str) -> Evaluation:
        return evaluate(alone(model), {"": adapters[client]}, data, "test", parts, everything(data), How(16))

    first = scored("a")
    model.set_dropout_key((1, "left on"))
    model.set_dropout_key(None)
    assert scored("b") != first
    assert scored("a") == first


def test_a_limit_scores_those_rows_and_clients_without_one_have_no_score(
    model: ResidentModel, adapters: dict[str, Adapter], data: Encoded, parts: dict[str, np.ndarray]
) -> None:
    rows = np.sort(np.concatenate([parts["a"][:5], parts["c"][:4]]))
    reference = dict(zip(rows.tolist(), plain(model, adapters["a"], data, rows), strict=True))
    for chosen in ({"": adapters["a"]}, dict.fromkeys("abc", adapters["a"])):
        found = evaluate(alone(model), chosen, data, "test", parts, rows, How(16))
        assert found.examples == 9
        assert set(found.clients) == {"a", "c"}
        assert found.scores == near(scores_of(list(reference.values())))
        assert found.clients["c"] == near(scores_of([reference[int(place)] for place in parts["c"][:4]]))


def test_bfloat16_scores_are_close(model: ResidentModel, data: Encoded) -> None:
    adapter = shaken(model.read().map(torch.zeros_like))
    full, half = (measure(model, adapter, data, everything(data), How(16, kind))[:, 1] for kind in ("fp32", "bf16"))
    assert not torch.equal(full, half)
    assert (full - half).norm() < 0.1 * full.norm()


@quick
@given(seeds, st.integers(1, 200), st.integers(1, 250))
def test_a_limit_is_a_fixed_subset_named_by_seed_and_split(seed: int, size: int, limit: int) -> None:
    rows = chosen_rows(size, limit, seed, "validation")
    assert len(rows) == min(size, limit)
    assert (np.diff(rows) > 0).all()
    assert set(rows.tolist()) <= set(range(size))
    assert rows.tolist() == chosen_rows(size, limit, seed, "validation").tolist()
    assert chosen_rows(size, None, seed, "validation").tolist() == list(range(size))


def test_another_seed_or_split_has_another_subset() -> None:
    first = chosen_rows(1000, 50, 1, "validation").tolist()
    assert first != chosen_rows(1000, 50, 2, "validation").tolist()
    assert first != chosen_rows(1000, 50, 1, "test").tolist()


def test_the_record_holds_plain_values_with_the_worst_client_and_the_spread() -> None:
    import json

    clients = {
        name: {"accuracy": value, "macro_f1": 0.1, "loss": 2.0}
        for name, value in zip("abc", (0.5, 0.8, 0.8), strict=True)
    }
    scores = {"accuracy": 0.75, "macro_f1": 0.7, "loss": 0.6}
    record = Evaluation("test", 60, "accuracy", scores, "personal", clients).record()
    assert record.pop("spread") == pytest.approx(0.02**0.5)
    assert record == {
        "split": "test",
        "examples": 60,
        "model": "personal",
        "metric": "accuracy",
        **scores,
        "worst": 0.5,
        "by_client": {"a": 0.5, "b": 0.8, "c": 0.8},
    }
    json.dumps(record)


def test_a_record_without_clients_has_no_worst_one() -> None:
    record = Evaluation("test", 1, "accuracy", {"accuracy": 1.0}).record()
    head = {"split": "test", "examples": 1, "model": "global", "metric": "accuracy"}
    assert record == {**head, "accuracy": 1.0, "by_client": {}}


@quick
@given(seeds, st.integers(1, 40), st.integers(2, 5))
def test_the_score_is_accuracy_macro_f1_and_mean_loss_by_definition(seed: int, n: int, labels: int) -> None:
    rng = np.random.default_rng(seed)
    guess, truth, losses = rng.integers(0, labels, n), rng.integers(0, labels, n), rng.random(n)
    found = score(torch.from_numpy(np.stack([guess, losses], axis=1)), torch.from_numpy(truth))
    rows = [(int(g), int(t), float(loss)) for g, t, loss in zip(guess, truth, losses, strict=True)]
    assert found == pytest.approx(scores_of(rows))
    assert all(type(value) is float for value in found.values())
