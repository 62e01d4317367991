"""Clients of smaller ranks: what cutting keeps, that padding loses nothing, and that both fit the alignment."""

from dataclasses import replace

import pytest
import torch
from core_helpers import SHAPES, assert_same, distance, make_adapter, moved, product, quick, random_rotation, seeds
from hypothesis import given
from hypothesis import strategies as st
from method_helpers import LAYERS, Client, apart, first_state, noise, play, rounds, updates
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.alignment import find_rotations, rotate
from fedrot.core.errors import RecipeError
from fedrot.core.methods import get_method, methods
from fedrot.core.methods.base import Seat
from fedrot.core.ranks import cut, first_frames, leading_frames, pad, put_back

rank_pairs = st.integers(1, 6).flatmap(lambda r: st.tuples(st.integers(1, r), st.just(r)))
kinds = pytest.mark.parametrize("frames_of", [leading_frames, first_frames])


def orthonormal_rows(adapter: Adapter, size: float = 1.0) -> Adapter:
    """The adapter with A A^T = size^2 I in every layer."""
    layers = {n: replace(p, a=size * torch.linalg.qr(p.a.T)[0].T) for n, p in adapter.layers.items()}
    return replace(adapter, layers=layers)


def lost(adapter: Adapter, frames: dict[str, Tensor], name: str) -> float:
    """||B A - B P^T P A||."""
    pair, p = adapter.layers[name], frames[name]
    return distance(pair.b @ pair.a, pair.b @ p.T @ p @ pair.a)


@kinds
@quick
@given(seed=seeds, ranks=rank_pairs)
def test_frames_are_orthonormal_rows_in_double_precision(frames_of, seed: int, ranks: tuple[int, int]) -> None:
    narrow, rank = ranks
    frames = frames_of(make_adapter(seed, rank), narrow)
    assert frames.keys() == SHAPES.keys()
    for p in frames.values():
        assert (p.shape, p.dtype) == ((narrow, rank), torch.float64)
        assert distance(p @ p.T, torch.eye(narrow)) < 1e-10


@kinds
@quick
@given(seed=seeds, ranks=rank_pairs, scale=st.sampled_from([0.5, 2.0, 8.0]), own=st.sampled_from([0.25, 2.0, 32.0]))
def test_cutting_is_the_projection_and_padding_loses_nothing_whatever_the_scales(
    frames_of,
    seed: int,
    ranks: tuple[int, int],
    scale: float,
    own: float,
) -> None:
    narrow, rank = ranks
    adapter = make_adapter(seed, rank, scale, dtype=torch.float64)
    frames = frames_of(adapter, narrow)
    small = cut(adapter, frames, own)
    trained = moved(small, seed + 1)
    back = pad(trained, frames, adapter)
    for name, pair in adapter.layers.items():
        p, size = frames[name], float(product(pair).norm()) + 1.0
        assert (small.layers[name].rank, small.layers[name].scale) == (narrow, own)
        assert distance(product(small.layers[name]), scale * pair.b @ p.T @ p @ pair.a) < 1e-11 * size
        assert (back.layers[name].rank, back.layers[name].scale) == (rank, scale)
        assert distance(product(back.layers[name]), product(trained.layers[name])) < 1e-11 * size * scale
    assert all(torch.equal(t, adapter.head[n]) for n, t in small.head.items())
    assert all(torch.equal(t, trained.head[n]) for n, t in back.head.items())


def test_the_base_layer_s_orientation_and_the_factors_precision_are_kept() -> None:
    adapter = make_adapter(0, 4, fan_in_fan_out=True)
    small = cut(adapter, leading_frames(adapter, 2), 1.0)
    for one in (small, pad(small, leading_frames(adapter, 2), adapter)):
        assert all(pair.fan_in_fan_out and pair.a.dtype == torch.float32 for pair in one.layers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_rank_keeps_the_whole_update(dtype: torch.dtype) -> None:
    adapter = make_adapter(0, 4, dtype=dtype)
    small = cut(adapter, first_frames(adapter, 4), 2.0)
    assert_same(small, adapter)
    whole = cut(adapter, leading_frames(adapter, 4), 2.0)
    for name, pair in whole.layers.items():
        rel = 1e-6 if dtype == torch.float32 else 0.03
        assert distance(product(pair), product(adapter.layers[name])) < rel * float(
            adapter.layers[name].b.norm() * adapter.layers[name].a.norm() * 2.0
        )


@quick
@given(seeds, rank_pairs, st.sampled_from([1.0, 1e-3, 50.0]))
def test_leading_frames_are_the_best_where_the_rows_of_a_are_alike(
    seed: int, ranks: tuple[int, int], size: float
) -> None:
    """There the best rank-q part of B A is in reach, and nothing keeps more than that (Eckart-Young)."""
    narrow, rank = ranks
    adapter = orthonormal_rows(make_adapter(seed, rank, dtype=torch.float64), size)
    frames = leading_frames(adapter, narrow)
    for name, pair in adapter.layers.items():
        values = torch.linalg.svdvals(pair.b @ pair.a)
        assert lost(adapter, frames, name) == pytest.approx(float(values[narrow:].norm()), rel=1e-8, abs=1e-12 * size)


@quick
@given(seeds)
def test_leading_frames_keep_about_the_most_whatever_the_rows_of_a_are(seed: int) -> None:
    adapter = make_adapter(seed, 4, dtype=torch.float64)
    found, first = leading_frames(adapter, 2), first_frames(adapter, 2)
    kept = [lost(adapter, found, name) for name in SHAPES]
    for loss, (name, pair) in zip(kept, adapter.layers.items(), strict=True):
        assert loss <= 2.0 * float(torch.linalg.svdvals(pair.b @ pair.a)[2:].norm()), name
    assert sum(kept) < sum(lost(adapter, first, name) for name in SHAPES)


@pytest.mark.parametrize("narrow", [1, 2, 3])
def test_while_b_is_zero_the_first_components_are_taken_layer_by_layer(narrow: int) -> None:
    fresh, later = make_adapter(0, 3, zero_b=True), make_adapter(0, 3)
    for name, p in leading_frames(fresh, narrow).items():
        assert torch.equal(p, torch.eye(3, dtype=torch.float64)[:narrow])
        assert torch.equal(first_frames(fresh, narrow)[name], p)
    mixed = replace(later, layers={**later.layers, "enc.0.query": fresh.layers["enc.0.query"]})
    frames, usual = leading_frames(mixed, narrow), leading_frames(later, narrow)
    assert torch.equal(frames["enc.0.query"], torch.eye(3, dtype=torch.float64)[:narrow])
    torch.testing.assert_close(frames["enc.0.value"], usual["enc.0.value"])  # the other one of the same shape


def test_the_sign_of_a_frame_s_rows_is_fixed() -> None:
    adapter = make_adapter(0, 5, dtype=torch.float64)
    mirrored = replace(adapter, layers={n: replace(p, b=-p.b) for n, p in adapter.layers.items()})
    for name, p in leading_frames(adapter, 3).items():
        assert bool((p.sum(-1) >= 0).all())
        torch.testing.assert_close(p, leading_frames(mirrored, 3)[name])


@pytest.mark.parametrize("frames_of", [leading_frames, first_frames])
@pytest.mark.parametrize("narrow", [0, -1, 4])
def test_a_rank_that_the_adapter_has_not_is_refused(frames_of, narrow: int) -> None:
    with pytest.raises(RecipeError, match=f"from 1 to the adapter's own, 3; got {narrow}"):
        frames_of(make_adapter(0, 3), narrow)


@quick
@given(seeds, st.integers(2, 6).flatmap(lambda r: st.tuples(st.integers(1, r - 1), st.just(r))))
def test_padded_factors_turn_to_the_semi_orthogonal_optimum_of_the_narrow_ones(
    seed: int, ranks: tuple[int, int]
) -> None:
    """Min ||Q A_i - A_ref|| over Q (r x q) with orthonormal columns: Q = U V^T of A_ref A_i^T = U S V^T."""
    narrow, rank = ranks
    reference = make_adapter(seed, rank, dtype=torch.float64)
    frames = leading_frames(reference, narrow)
    local = moved(cut(reference, frames, 2.0), seed + 1, 0.5)
    padded = pad(local, frames, reference)
    result = rotate(padded, find_rotations(padded, reference, "A", 1.0))
    for name, pair in result.layers.items():
        mine, theirs = local.layers[name], reference.layers[name]
        u, _, vh = torch.linalg.svd(theirs.a @ mine.a.T, full_matrices=False)
        assert distance(pair.a, u @ vh @ mine.a) < 1e-7 * float(mine.a.norm())
        assert distance(product(pair), product(mine)) < 1e-10 * float(mine.a.norm() * mine.b.norm() * 2)


@pytest.mark.parametrize("strength", [0.4, 1.0, "auto"])
@pytest.mark.parametrize("factor", ["alternate", "A", "B", "joint"])
def test_mixed_ranks_through_fedrot_keep_every_client_s_update(strength: float, factor: str) -> None:
    method = get_method("fedrot")(strength=strength, factor=factor)
    mixed = (Client("north", 1, rank=1, scale=8.0), Client("south", 5), Client("west", 2, rank=2, scale=4.0))
    state = method.start(make_adapter(0, 4, 2.0, LAYERS, torch.float64))
    for number in range(3):
        played = play(method, state, mixed, noise(0.3, number))
        for local, sent in zip(played.trained, played.sent, strict=True):
            assert apart(updates(sent), updates(local)) < 1e-12
            assert all(pair.rank == 4 and pair.scale == 2.0 for pair in sent.layers.values())
        state = played.after


def test_a_narrow_client_trains_its_rank_and_uploads_the_same_update_at_the_full_one() -> None:
    seen: list[Adapter] = []

    def train(start: Adapter, client: str) -> Adapter:
        seen.append(noise()(start, client))
        return seen[-1]

    method = get_method("fedit")()
    state = first_state(method, make_adapter(0, 4, 2.0, LAYERS, torch.float64), 1)
    played = play(method, state, (Client("north", 1, rank=2, scale=8.0),), train)
    assert all(pair.rank == 2 and pair.scale == 8.0 for pair in seen[0].layers.values())
    assert apart(updates(played.sent[0]), updates(seen[0])) < 1e-12


def test_what_a_narrow_client_leaves_out_counts_as_zero_in_an_average() -> None:
    """HetLoRA's and the padding's known dilution: the client's rows beyond its rank are zeros."""
    adapter = make_adapter(0, 4, dtype=torch.float64)
    frames = first_frames(adapter, 2)
    back = pad(cut(adapter, frames, 2.0), frames, adapter)
    for name, pair in back.layers.items():
        assert torch.equal(pair.a[:2], adapter.layers[name].a[:2])
        assert not bool(pair.a[2:].any())
        assert not bool(pair.b[:, 2:].any())


@quick
@given(seeds, rank_pairs)
def test_putting_back_keeps_the_update_and_the_rows_of_a_that_were_left_out(seed: int, ranks: tuple[int, int]) -> None:
    narrow, rank = ranks
    adapter = make_adapter(seed, rank, dtype=torch.float64)
    frames = leading_frames(adapter, narrow)
    local = moved(cut(adapter, frames, 8.0), seed + 1, 0.5)
    back, padded = put_back(local, frames, adapter), pad(local, frames, adapter)
    for name, pair in back.layers.items():
        p, size = frames[name], float(product(padded.layers[name]).norm()) + 1.0
        assert distance(product(pair), product(padded.layers[name])) < 1e-11 * size
        left_out = torch.eye(rank, dtype=torch.float64) - p.T @ p
        assert distance(left_out @ pair.a, left_out @ adapter.layers[name].a) < 1e-11
        assert distance(p @ pair.a, local.layers[name].a) < 1e-11
    untouched = put_back(cut(adapter, frames, 8.0), frames, adapter)
    assert max(distance(pair.a, adapter.layers[name].a) for name, pair in untouched.layers.items()) < 1e-12


@quick
@given(seeds, rank_pairs, st.integers(0, 6))
def test_an_a_beside_a_common_b_keeps_what_b_does_not_read(seed: int, ranks: tuple[int, int], zeros: int) -> None:
    narrow, rank = ranks
    adapter = make_adapter(seed, rank, dtype=torch.float64)
    turn = random_rotation(seed, rank)
    for pair in adapter.layers.values():  # B of a smaller rank than A's, in any frame
        pair.b[:, : min(zeros, rank)] = 0
        pair.b.copy_(pair.b @ turn)
    frames = leading_frames(adapter, narrow)
    local = moved(cut(adapter, frames, 2.0), seed + 1, 0.5)
    back = put_back(local, frames, adapter, beside=True)
    for name, pair in back.layers.items():
        b, p, start = adapter.layers[name].b, frames[name], adapter.layers[name].a
        assert distance(b @ pair.a, b @ p.T @ local.layers[name].a) < 1e-9
        free = torch.eye(rank, dtype=torch.float64) - torch.linalg.pinv(b, rtol=1e-6) @ b
        left_out = start - p.T @ (p @ start)
        assert distance(free @ pair.a, free @ (p.T @ local.layers[name].a + left_out)) < 1e-9


@pytest.mark.parametrize("name", [name for name, kind in methods().items() if kind.capabilities.mixed_ranks])
def test_a_round_of_narrow_clients_alone_leaves_rows_for_others_to_train(name: str) -> None:
    """Where A and B are both zero no gradient ever comes; HetLoRA's zeros are as published."""
    method = get_method(name)()
    state = method.start(make_adapter(0, 4, 2.0, LAYERS, torch.float64, zero_b=True))
    alone = (Client("north", 1, rank=1, scale=2.0), Client("west", 2, rank=1, scale=2.0))
    after = play(method, state, alone, noise(0.1)).after.broadcast.adapter
    dead = [not bool(p.a[i].any()) and not bool(p.b[:, i].any()) for p in after.layers.values() for i in range(4)]
    assert any(dead) == (name == "hetlora")


@pytest.mark.parametrize("name", ["local", "fedsa"])
def test_a_narrow_client_goes_on_from_the_model_of_its_own(name: str) -> None:
    """Its B_i is of its rank already, so cutting the global adapter with it can lose nothing of it."""
    mixed = (Client("north", 1, rank=2, scale=2.0), Client("south", 1))
    for played in rounds(get_method(name)(), make_adapter(0, 4, 2.0, LAYERS, torch.float64, zero_b=True), mixed, 3):
        method = get_method(name)()
        own = method.begin(played.after.broadcast, Seat("north", played.kept["north"]))
        small = cut(own, method.narrow(own, 2), 2.0)
        assert apart(updates(small), updates(own)) < 1e-9


def test_frames_of_any_kind_are_taken() -> None:
    """Cut and pad ask for orthonormal rows and for nothing else."""
    adapter = Adapter({"q": LoraPair(*_factors(4), 2.0)})
    frames = {"q": random_rotation(3, 4)[:2]}
    small = cut(adapter, frames, 1.0)
    assert distance(product(pad(small, frames, adapter).layers["q"]), product(small.layers["q"])) < 1e-12


def _factors(rank: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(rank, 9, generator=rng).double(), torch.randn(7, rank, generator=rng).double()
