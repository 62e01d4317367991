"""Late uploads: what a change counts, and that it is added to the current factors in the current frame."""

from dataclasses import replace

import pytest
import torch
from core_helpers import make_adapter, moved, random_rotations, turned

from fedrot.core.adapter import Adapter
from fedrot.core.alignment import rotate
from fedrot.core.late import brought_up, damping, turn_between
from fedrot.core.methods.base import ALL_PARTS, Upload

SENT = make_adapter(1)
LOCAL = moved(SENT, 2)


def upload(adapter: Adapter) -> Upload:
    return Upload("client", adapter, held=3, used=5)


def halfway(now: Adapter) -> Adapter:
    """By hand: `now` plus half of what the client changed."""
    sent, local = dict(SENT.tensors()), dict(LOCAL.tensors())
    return now.with_tensors({n: t + 0.5 * (local[n] - sent[n]) for n, t in now.tensors()})


def descended(adapter: Adapter, rate: float = 0.01) -> Adapter:
    """The adapter after a step of gradient descent on both factors, for a gradient G of the update: that is no turn."""
    rng = torch.Generator().manual_seed(3)
    layers = {}
    for name, pair in adapter.layers.items():
        g = torch.randn(pair.b.shape[0], pair.a.shape[1], generator=rng)
        layers[name] = replace(pair, a=pair.a - rate * pair.b.T @ g, b=pair.b - rate * g @ pair.a.T)
    return replace(adapter, layers=layers)


def assert_close(found: Adapter, wanted: Adapter, atol: float = 1e-5) -> None:
    tensors = dict(wanted.tensors())
    for name, tensor in found.tensors():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    ("staleness", "counts"),
    [("none", [1, 1, 1, 1]), ("sqrt", [1, 0.70711, 0.57735, 0.5]), ("linear", [1, 0.5, 0.33333, 0.25])],
)
def test_a_change_counts_less_the_later_it_is(staleness: str, counts: list[float]) -> None:
    assert [damping(staleness, late) for late in range(4)] == pytest.approx(counts, abs=1e-5)  # type: ignore[arg-type]


def test_a_change_is_added_and_what_others_learnt_meanwhile_stays() -> None:
    now = descended(SENT)
    turn = turn_between(SENT, now, ALL_PARTS)
    assert all(torch.equal(r, torch.eye(3, dtype=torch.float64)) for r in turn.values())
    assert_close(brought_up(upload(LOCAL), SENT, now, turn, 0.5).adapter, halfway(now))


def test_a_frame_that_turned_meanwhile_changes_no_update() -> None:
    """The server is where it was, in another frame: the upload counts as if nothing had happened."""
    frame = random_rotations(4, SENT)
    now = turned(SENT, frame)
    found = brought_up(upload(LOCAL), SENT, now, turn_between(SENT, now, ALL_PARTS), 0.5).adapter
    assert_close(found, turned(halfway(SENT), frame))
    for name, pair in halfway(SENT).layers.items():
        torch.testing.assert_close(found.layers[name].delta(), pair.delta(), rtol=1e-4, atol=1e-4)
        plain = brought_up(upload(LOCAL), SENT, now, {}, 0.5).adapter.layers[name]
        assert float((plain.delta() - pair.delta()).norm()) > 0.1 * float(pair.delta().norm())


def test_where_one_factor_travels_nothing_turns_and_the_other_is_the_servers_own() -> None:
    now = turned(moved(SENT, 3), random_rotations(4, SENT))
    assert turn_between(SENT, now, frozenset({"b", "head"})) == {}
    sent = replace(SENT, layers={n: replace(p, b=LOCAL.layers[n].b) for n, p in SENT.layers.items()})
    found = brought_up(upload(sent), SENT, now, {}, 0.5).adapter
    for name, pair in found.layers.items():
        assert torch.equal(pair.a, now.layers[name].a)
        assert not torch.equal(pair.b, now.layers[name].b)


def test_diagnostics_see_a_late_upload_without_its_alignment_too() -> None:
    now, aligned = moved(SENT, 3), random_rotations(5, SENT)
    found = brought_up(replace(upload(rotate(LOCAL, aligned)), rotation=aligned), SENT, now, {}, 0.5)
    assert found.unturned is not None
    assert_close(found.unturned, halfway(now))
    assert brought_up(upload(LOCAL), SENT, now, {}, 0.5).unturned is None
