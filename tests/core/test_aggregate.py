"""`fedrot.aggregate` against dense formulas, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from core_helpers import (
    SHAPES,
    assert_close,
    assert_same,
    distance,
    make_adapter,
    moved,
    product,
    quick,
    random_rotations,
    seeds,
    turned,
    weighted,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedrot import aggregate, align
from fedrot.core.adapter import Adapter, LoraPair

WEIGHTS = {1: [7.0], 2: [1.0, 9.0], 5: [3.0, 0.5, 100.0, 20.0, 1.0]}
setups = pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["linear", "conv1d"])
counts = pytest.mark.parametrize("count", list(WEIGHTS))


def polar(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m)
    fix = torch.ones(len(m), dtype=m.dtype)
    fix[-1] = torch.linalg.det(u @ vh)
    return u @ torch.diag(fix) @ vh


def dense_result(
    pairs: list[LoraPair], weights: list[float], reference: LoraPair, factor: str, strength: float
) -> Tensor:
    """Scale * Bbar Abar of the paper's formulas, written out layer by layer."""
    eye = torch.eye(reference.rank, dtype=torch.float64)
    turned_a, turned_b = [], []
    for pair in pairs:
        a, b = pair.a.double(), pair.b.double()
        m = a @ reference.a.double().T if factor == "A" else b.T @ reference.b.double()
        r = polar((1 - strength) * eye + strength * polar(m)) if strength else eye
        turned_a.append(r.T @ a)
        turned_b.append(b @ r)
    return pairs[0].scale * weighted(turned_b, weights) @ weighted(turned_a, weights)


def assert_merged(result: Adapter, expected: dict[str, Tensor], rel: float) -> None:
    """W0 + update has the base layer's orientation and the value that `expected`, (d_out, d_in), says."""
    for i, (name, pair) in enumerate(result.layers.items()):
        d_in, d_out = SHAPES[name]
        base = torch.randn(
            (d_in, d_out) if pair.fan_in_fan_out else (d_out, d_in), generator=torch.Generator().manual_seed(i)
        )
        should = base.double() + (expected[name].T if pair.fan_in_fan_out else expected[name])
        assert distance(base + pair.delta(), should) <= rel * float(should.norm()), name


@setups
@counts
@pytest.mark.parametrize("rank", range(1, 7))
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_fedit_is_the_dense_product_of_weighted_mean_factors(rank, scale, count, fan_in_fan_out):
    adapters = [make_adapter(i, rank, scale, fan_in_fan_out=fan_in_fan_out) for i in range(count)]
    result = aggregate(adapters, WEIGHTS[count], "fedit")
    expected = {}
    for name in SHAPES:
        pairs = [adapter.layers[name] for adapter in adapters]
        mean_a, mean_b = (weighted([getattr(p, s) for p in pairs], WEIGHTS[count]) for s in "ab")
        torch.testing.assert_close(result.layers[name].a, mean_a.float())
        torch.testing.assert_close(result.layers[name].b, mean_b.float())
        expected[name] = scale * mean_b @ mean_a
    assert_merged(result, expected, 1e-6)


@setups
@counts
@pytest.mark.parametrize("rank", range(1, 7))
@pytest.mark.parametrize(("factor", "strength"), [("A", 0.4), ("B", 0.4), ("A", 1.0), ("B", 1.0), ("A", 0.0)])
def test_fedrot_is_the_dense_formula_of_the_paper(rank, factor, strength, count, fan_in_fan_out):
    reference = make_adapter(50, rank, 1.5, fan_in_fan_out=fan_in_fan_out)
    adapters = [make_adapter(i, rank, 1.5, fan_in_fan_out=fan_in_fan_out) for i in range(count)]
    result = aggregate(adapters, WEIGHTS[count], "fedrot", reference, factor=factor, strength=strength)
    expected = {
        name: dense_result([a.layers[name] for a in adapters], WEIGHTS[count], pair, factor, strength)
        for name, pair in reference.layers.items()
    }
    assert_merged(result, expected, 1e-5)


@pytest.mark.parametrize("method", ["fedit", "fedrot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_and_returned_in_float32(method, dtype):
    reference = make_adapter(9, dtype=dtype)
    adapters = [moved(reference, i) for i in range(3)]
    wide = [adapter.map(Tensor.float) for adapter in adapters]
    result = aggregate(adapters, None, method, reference)
    assert_same(result, aggregate(wide, None, method, reference.map(Tensor.float)))
    assert all(t.dtype == torch.float32 for _, t in result.tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fedrot_turns_each_adapter_as_align_does_whatever_the_precision(dtype):
    def rank_one(seed: int) -> Adapter:
        # The same leading direction, beside it each adapter's own rounding alone.
        rng = torch.Generator().manual_seed(0)
        u, v = torch.randn(4, 1, generator=rng), torch.randn(1, 64, generator=rng)
        return Adapter({"q": LoraPair(((1 + 0.37 * seed) * u @ v).to(dtype), torch.ones(9, 4, dtype=dtype), 1.0)})

    adapters, reference = [rank_one(1), rank_one(2)], rank_one(0)
    result = aggregate(adapters, method="fedrot", reference=reference, strength=1.0)
    aligned = [align(adapter, reference, "A", 1.0) for adapter in adapters]
    assert_close(result, aggregate(aligned), rel=1e-5)


@counts
def test_the_head_is_averaged_by_the_same_weights_and_never_turned(count):
    adapters = [make_adapter(i) for i in range(count)]
    for method in ("fedit", "fedrot"):
        result = aggregate(adapters, WEIGHTS[count], method, make_adapter(50))
        for name, tensor in result.head.items():
            mean = weighted([adapter.head[name] for adapter in adapters], WEIGHTS[count])
            torch.testing.assert_close(tensor, mean.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["fedit", "fedrot"])
def test_zero_b_stays_zero_and_a_is_averaged(method):
    adapters = [make_adapter(i, zero_b=True) for i in range(3)]
    result = aggregate(adapters, None, method, make_adapter(9))
    assert all(not bool(pair.b.any()) and bool(pair.a.any()) for pair in result.layers.values())


@quick
@given(seeds, st.sampled_from(["fedit", "fedrot"]), st.permutations(range(4)))
def test_the_order_of_the_adapters_does_not_matter(seed, method, order):
    adapters, weights = [make_adapter(seed + i) for i in range(4)], [1.0, 2.0, 3.0, 4.0]
    reference = make_adapter(seed + 9)
    one = aggregate(adapters, weights, method, reference)
    other = aggregate([adapters[i] for i in order], [weights[i] for i in order], method, reference)
    assert_close(one, other, rel=1e-5)


@quick
@given(seeds, st.floats(1e-4, 1e6))
def test_only_the_ratio_of_the_weights_counts_and_none_weighs_all_alike(seed, size):
    adapters = [make_adapter(seed + i) for i in range(3)]
    assert_close(aggregate(adapters, [size, 3 * size, size]), aggregate(adapters, [1, 3, 1]), rel=1e-6)
    assert_close(aggregate(adapters, [size] * 3), aggregate(adapters), rel=1e-6)


def test_the_first_adapter_alone_is_not_the_result():
    adapters = [make_adapter(i) for i in range(3)]
    result = aggregate(adapters)
    for i in range(3):
        assert distance(product(result.layers["enc.0.out"]), product(adapters[i].layers["enc.0.out"])) > 1.0
        changed = [moved(a, 9) if j == i else a for j, a in enumerate(adapters)]
        assert distance(aggregate(changed).layers["enc.0.out"].a, result.layers["enc.0.out"].a) > 0.1


def test_one_adapter_is_its_own_average():
    assert_same(aggregate([make_adapter(0)], [3]), make_adapter(0))


def test_strength_0_is_fedit_bit_for_bit_and_factor_a_and_strength_04_are_the_defaults():
    adapters, reference = [make_adapter(i) for i in range(3)], make_adapter(9)
    assert_same(aggregate(adapters, method="fedrot", reference=reference, strength=0.0), aggregate(adapters))
    plain = aggregate(adapters, method="fedrot", reference=reference)
    assert_same(plain, aggregate(adapters, method="fedrot", reference=reference, factor="A", strength=0.4))
    other = aggregate(adapters, method="fedrot", reference=reference, factor="B")
    assert distance(other.layers["enc.0.out"].a, plain.layers["enc.0.out"].a) > 0.1


def test_alignment_recovers_what_the_clients_frames_hide():
    adapter = make_adapter(0, dtype=torch.float64)
    clients = [turned(adapter, random_rotations(seed, adapter)) for seed in (10, 20, 30)]
    assert_close(aggregate(clients, method="fedrot", reference=adapter, strength=1.0), adapter, rel=1e-9)
    lost = aggregate(clients).layers["enc.0.out"]
    assert distance(product(lost), product(adapter.layers["enc.0.out"])) > 1.0


def test_what_is_no_tensor_comes_from_the_first_adapter():
    adapters = [replace(make_adapter(i, scale=0.25, fan_in_fan_out=True), config={"r": i}) for i in range(2)]
    result = aggregate(adapters)
    assert result.config == {"r": 0}
    assert all(p.scale == 0.25 and p.fan_in_fan_out for p in result.layers.values())


@pytest.fixture
def every_warning():
    torch.set_warn_always(True)  # some are given once a process
    yield
    torch.set_warn_always(False)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("every_warning")
@pytest.mark.parametrize("method", ["fedit", "fedrot", "fedask", "fedrot_svd", "flora"])
def test_live_parameters_are_averaged_and_saved_as_their_values(method, tmp_path):
    adapters = [make_adapter(i) for i in range(3)]
    live = [one.map(lambda t: nn.Parameter(t.clone())) for one in adapters]
    found = aggregate(live[:2], method=method, reference=live[2])
    assert not any(t.requires_grad for _, t in found.tensors())
    assert_same(found, aggregate(adapters[:2], method=method, reference=adapters[2]))
    live[0].save(tmp_path)
    assert_same(Adapter.load(tmp_path), adapters[0])


@pytest.mark.parametrize(("scale", "rank"), [(2.0, 3), (1 / 3, 3), (0.2, 3), (0.9, 41)])
def test_an_adapter_and_its_saved_copy_can_be_averaged(tmp_path, scale, rank):
    adapter = make_adapter(0, rank, scale)
    adapter.save(tmp_path)
    assert_same(aggregate([adapter, Adapter.load(tmp_path)]), adapter)
