"""Compressed uploads: what a codec may lose, that nothing is lost for good, and that no payload is trusted."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest
import torch
from core_helpers import SHAPES, assert_same, make_adapter, moved, quick, ranks, refused, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair, part_of
from fedrot.core.compression import Codec, compress, decode, decompress, encode, payload_bytes
from fedrot.core.errors import AdapterError
from fedrot.core.methods.base import ALL_PARTS
from fedrot.core.packed import Layout
from fedrot.core.seeding import generator

LOSSY: tuple[Codec, ...] = ("bf16", "int8")
every_codec = pytest.mark.parametrize("codec", ["none", *LOSSY])
lossy = pytest.mark.parametrize("codec", LOSSY)

FORM = make_adapter(0)
SENT = moved(FORM, 1, 0.01)
LAYOUT = Layout.of(FORM, ALL_PARTS)


def seed(*key: int | str) -> torch.Generator:
    return generator("test", *key)


def sizes(changes: Sequence[Tensor], layout: Layout) -> Tensor:
    """The largest number of each component over all changes, spread over the numbers: a row of A, a column of B, a row
    of a matrix of the head, all of a vector.
    """
    spread = torch.zeros(layout.size)
    for change in changes:
        into = layout.split(spread)
        for name, x in layout.split(change.abs()).items():
            if part_of(name) == "b":
                largest = x.amax(0, keepdim=True)
            else:
                largest = x.amax(1, keepdim=True) if x.ndim == 2 else x.amax()
            into[name].copy_(torch.maximum(into[name], largest.expand_as(x)))
    return spread


def change_of(arrived: Adapter, broadcast: Adapter, layout: Layout = LAYOUT) -> Tensor:
    """In float64."""
    return layout.pack(arrived).double() - layout.pack(broadcast).double()


@quick
@given(seeds, ranks, st.sampled_from([ALL_PARTS, {"a"}, {"b", "head"}, {"a", "head"}, set()]))
def test_without_compression_the_payload_is_the_adapter_bit_for_bit(number, rank, parts):
    form = make_adapter(number, rank)
    sent, layout = moved(form, number + 1, 10.0), Layout.of(form, parts)
    made = compress(sent, form, layout, "none", seed())
    mine = dict(sent.tensors())
    assert_same(made.adapter, form.with_tensors({n: mine[n] if part_of(n) in parts else t for n, t in form.tensors()}))
    assert torch.equal(made.payload, layout.pack(sent).view(torch.uint8))
    assert not made.lost


@quick
@given(seeds, st.floats(1e-30, 1e30))
def test_bf16_is_the_nearest_number_ties_to_even(number, size):
    change = size * torch.randn(LAYOUT.size, generator=seed(number))
    change[::3] = (change[::3].view(torch.int32) & -65536 | 0x8000).view(torch.float32)  # halfway between two numbers
    bits = change.view(torch.int32).long() & 0xFFFFFFFF
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).to(torch.int64)
    expected = torch.where(nearest >= 2**31, nearest - 2**32, nearest).int().view(torch.float32)
    payload = encode(change, LAYOUT, "bf16", seed())
    assert torch.equal(decode(payload, LAYOUT, "bf16"), expected)
    assert bool(((expected - change).abs() <= change.abs() * 2**-8).all())


@quick
@given(seeds, st.floats(1e-30, 1e30))
def test_int8_is_off_by_less_than_one_step_of_its_own_component(number, size):
    change = size * torch.randn(LAYOUT.size, generator=seed(number))
    off = (decode(encode(change, LAYOUT, "int8", seed(number)), LAYOUT, "int8") - change).abs()
    assert bool((off <= sizes([change], LAYOUT) / 127 * (1 + 1e-5)).all())


@lossy
@given(seeds)
@quick
def test_of_an_upload_the_change_is_rounded_and_not_the_factors(codec, number):
    """Where factors are large and changes small, rounding factors would lose them all."""
    form = make_adapter(number).map(lambda t: 1000 * t)
    sent = moved(form, number, 0.01)
    true = change_of(sent, form)
    off = change_of(compress(sent, form, LAYOUT, codec, seed(number)).adapter, form) - true
    assert float(off.norm()) < 0.03 * float(true.norm())


def test_stochastic_rounding_is_right_in_the_mean_over_seeds():
    layout = Layout.of(make_adapter(0, shapes={"x": (5, 4)}, rank=2), ALL_PARTS)
    change = torch.randn(layout.size, generator=seed())
    draws = 4000
    found = torch.stack(
        [decode(encode(change, layout, "int8", seed(i)), layout, "int8") for i in range(draws)]
    ).double()
    step = sizes([change], layout) / 127
    # One draw has a standard deviation of half a step at most: five of the mean's.
    assert bool(((found.mean(0) - change).abs() <= 5 * step / 2 / draws**0.5).all())
    nearest = (change / step).round() * step
    assert bool(((nearest - change).abs() > 5 * step / 2 / draws**0.5).any()), "nearest rounding would pass this test"


def test_a_large_entry_costs_its_own_component_alone():
    plain = torch.randn(LAYOUT.size, generator=seed())
    spoilt = plain.clone()
    for name, place in (
        ("layers/enc.0.out/a", (1, 4)),
        ("layers/enc.0.query/b", (5, 2)),
        ("head/classifier.weight", (0, 7)),
    ):
        LAYOUT.split(spoilt)[name][place] = 1e6
    one, other = (LAYOUT.split(decode(encode(t, LAYOUT, "int8", seed()), LAYOUT, "int8")) for t in (plain, spoilt))
    differ = {name: {tuple(place) for place in (one[name] != other[name]).nonzero().tolist()} for name in one}
    assert {place[0] for place in differ.pop("layers/enc.0.out/a")} == {1}
    assert {place[1] for place in differ.pop("layers/enc.0.query/b")} == {2}
    assert {place[0] for place in differ.pop("head/classifier.weight")} == {0}
    assert not any(differ.values())


@lossy
def test_what_did_not_change_arrives_unchanged(codec):
    made = compress(FORM, FORM, LAYOUT, codec, seed())
    assert_same(made.adapter, FORM)
    assert not any(bool(t.any()) for t in made.lost.values())


def feed(
    codec: Codec, changes: Callable[[int], Tensor], rounds: int, feedback: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """After each round the sum of what arrived less the sum of what was sent, and the changes. The broadcast goes on by
    what arrived, as it does with one client.
    """
    broadcast, lost, total = FORM, {}, torch.zeros(LAYOUT.size, dtype=torch.float64)
    behind, true = [], []
    for number in range(rounds):
        local = LAYOUT.unpack(LAYOUT.pack(broadcast) + changes(number), broadcast)
        true.append(change_of(local, broadcast).float())
        made = compress(local, broadcast, LAYOUT, codec, seed("feed", number), lost if feedback else None)
        total += change_of(made.adapter, broadcast) - true[-1].double()
        behind.append(total.clone())
        broadcast, lost = made.adapter, made.lost
    return behind, true


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("kind", ["alike", "random"])
def test_with_feedback_sums_over_rounds_miss_the_last_round_s_loss_alone(codec, kind):
    def changes(number: int) -> Tensor:
        return 0.01 * torch.randn(LAYOUT.size, generator=seed("change", number if kind == "random" else 0))

    behind, true = feed(codec, changes, 120)
    # lost <= (change + lost) / 127 of a component's largest number, or / 256 of each number; and the sums' rounding.
    share = 126 if codec == "int8" else 255
    bound = sizes(true, LAYOUT) / share + 120 * 2**-24
    for total in behind:
        assert bool((total.abs() <= bound).all())
    alone, _ = feed(codec, changes, 120, feedback=False)
    assert float(alone[-1].norm()) > 3 * float(behind[-1].norm())


@quick
@given(seeds, st.sampled_from(LOSSY))
def test_what_is_lost_is_what_did_not_arrive(number, codec):
    before = {name: 1e-4 * t for name, t in moved(FORM, number).tensors()}
    made = compress(SENT, FORM, LAYOUT, codec, seed(number), before)
    assert list(made.lost) == list(LAYOUT.names)
    found = change_of(made.adapter, FORM) + torch.cat([t.flatten() for t in made.lost.values()])
    wanted = change_of(SENT, FORM) + torch.cat([before[name].flatten() for name in LAYOUT.names])
    torch.testing.assert_close(found, wanted, atol=1e-8, rtol=0)


@lossy
def test_of_parts_that_do_not_travel_nothing_is_added_and_nothing_is_lost(codec):
    layout = Layout.of(FORM, {"b"})
    lost = {name: torch.ones_like(t) for name, t in FORM.tensors() if part_of(name) == "a"}
    made = compress(SENT, FORM, layout, codec, seed(), lost)
    assert {part_of(name) for name in made.lost} == {"b"}
    assert_same(made.adapter, compress(SENT, FORM, layout, codec, seed()).adapter)
    for name, tensor in FORM.tensors():
        assert (dict(made.adapter.tensors())[name] is tensor) == (part_of(name) != "b")


def test_a_payload_is_as_large_as_it_is_said_to_be():
    """Eleven numbers of one layer and three of a head, in one component and three."""
    form = Adapter({"x": LoraPair(torch.ones(1, 7), torch.ones(4, 1), 1.0)}, {"w": torch.ones(3, 1)})
    layout = Layout.of(form, ALL_PARTS)
    assert {codec: payload_bytes(layout, codec) for codec in ("none", "bf16", "int8")} == {
        "none": 56, "bf16": 28, "int8": 14 + 4 * (1 + 1 + 3),
    }  # fmt: skip
    for parts in (ALL_PARTS, {"a"}, {"head"}, set()):
        layout = Layout.of(FORM, parts)
        for codec in ("none", *LOSSY):
            made = compress(SENT, FORM, layout, codec, seed())
            assert made.payload.dtype == torch.uint8
            assert tuple(made.payload.shape) == (payload_bytes(layout, codec),)


def test_scales_come_first_and_each_belongs_to_its_component():
    form = Adapter({"x": LoraPair(torch.zeros(2, 3), torch.zeros(2, 2), 1.0)}, {"bias": torch.zeros(2)})
    scales = torch.tensor([1.0, 2.0, 10.0, 20.0, 0.5])
    codes = torch.tensor([1, 2, 3, -1, -2, -3, 4, 5, 6, 7, 127, -127], dtype=torch.int8)
    payload = torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)])
    found = decompress(payload, form, Layout.of(form, ALL_PARTS), "int8")
    assert found.layers["x"].a.tolist() == [[1, 2, 3], [-2, -4, -6]]
    assert found.layers["x"].b.tolist() == [[40, 100], [60, 140]]
    assert found.head["bias"].tolist() == [63.5, -63.5]


def test_randomness_is_the_generator_s_alone():
    payloads = [compress(SENT, FORM, LAYOUT, "int8", seed(i)).payload for i in (0, 0, 1)]
    assert torch.equal(payloads[0], payloads[1])
    assert not torch.equal(payloads[0], payloads[2])
    assert torch.equal(*(compress(SENT, FORM, LAYOUT, "bf16", seed(i)).payload for i in (0, 1)))


@every_codec
@given(seeds)
@quick
def test_client_and_server_make_the_same_of_a_payload(codec, number):
    sent = moved(FORM, number)
    made = compress(sent, FORM, LAYOUT, codec, seed(number))
    assert_same(decompress(made.payload, FORM, LAYOUT, codec), made.adapter)
    padded = torch.cat([torch.zeros(1, dtype=torch.uint8), made.payload])[1:]  # where no float may lie
    apart = torch.stack([made.payload, made.payload], 1)[:, 0]
    for payload in (padded, apart):
        assert_same(decompress(payload, FORM, LAYOUT, codec), made.adapter)


@lossy
def test_the_largest_numbers_survive(codec):
    change = torch.full((LAYOUT.size,), torch.finfo(torch.float32).max)
    change[::2] *= -1
    found = decode(encode(change, LAYOUT, codec, seed()), LAYOUT, codec)
    torch.testing.assert_close(found, change, rtol=0.01, atol=0)


def test_the_smallest_numbers_do_no_harm():
    change = torch.full((LAYOUT.size,), 1e-45)
    change[::2] *= -1
    assert float(decode(encode(change, LAYOUT, "int8", seed()), LAYOUT, "int8").abs().max()) <= 1e-44


@lossy
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_sent(codec, value):
    spoilt = {name: t.clone() for name, t in SENT.tensors()}
    spoilt["head/classifier.bias"][1] = value
    with refused("not finite", error=AdapterError):
        compress(FORM.with_tensors(spoilt), FORM, LAYOUT, codec, seed())


@every_codec
def test_another_form_is_not_sent(codec):
    other = make_adapter(0, shapes={n: s for n, s in SHAPES.items() if n != "enc.1.query"})
    with refused("layers/enc.1.query/a is missing", error=AdapterError):
        compress(other, FORM, LAYOUT, codec, seed())


@every_codec
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p[:-1],
        lambda p: torch.cat([p, p[:1]]),
        lambda p: p[:0],
        lambda p: p[None],
        lambda p: p.view(torch.int8),
        lambda p: p.float(),
        lambda p: torch.zeros((), dtype=torch.uint8),
        lambda p: torch.zeros(1, dtype=torch.uint8).expand(10**15),  # as large as it says only if somebody copies it
    ],
    ids=["short", "long", "empty", "two axes", "signed", "floats", "a number", "endless"],
)
def test_a_payload_of_another_size_or_kind_is_refused(codec, change):
    payload = change(compress(SENT, FORM, LAYOUT, codec, seed()).payload)
    with refused(f"{codec} payload", f"{payload_bytes(LAYOUT, codec)} bytes", error=AdapterError):
        decompress(payload, FORM, LAYOUT, codec)


@pytest.mark.parametrize("place", [0, 7, -1])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), -1.0, -1e-45, 3e36])
def test_a_scale_that_no_client_sends_is_refused(scale, place):
    payload = compress(SENT, FORM, LAYOUT, "int8", seed()).payload
    payload[: len(payload) - LAYOUT.size].view(torch.float32)[place] = scale
    with refused("int8 payload", "scale", error=AdapterError):
        decompress(payload, FORM, LAYOUT, "int8")


def test_a_code_that_no_client_sends_is_refused():
    payload = compress(SENT, FORM, LAYOUT, "int8", seed()).payload
    payload[-3] = 128  # -128
    with refused("int8 payload", "a code is below -127", error=AdapterError):
        decompress(payload, FORM, LAYOUT, "int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    payload = compress(SENT, FORM, LAYOUT, "bf16", seed()).payload
    payload.view(torch.bfloat16)[5] = value
    with refused("bf16 payload", "not finite", error=AdapterError):
        decompress(payload, FORM, LAYOUT, "bf16")


@quick
@given(seeds, st.sampled_from(LOSSY), st.integers(0, 2**31), st.integers(0, 255))
def test_with_any_byte_changed_it_is_refused_or_finite(number, codec, place, byte):
    payload = compress(SENT, FORM, LAYOUT, codec, seed(number)).payload
    payload[place % len(payload)] = byte
    with suppress(AdapterError):
        assert bool(torch.isfinite(decode(payload, LAYOUT, codec)).all())
