"""Whatever arrives: an upload is a valid one or refused with a reason, a site answers, and nothing else changes."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import first_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from network_sites import LocalPost, deployed, divide_files
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.checks import RejectedUpload, check_upload
from fedrot.core.compression import compress
from fedrot.core.drift import client_drift
from fedrot.core.methods.base import ALL_PARTS, Broadcast, Upload
from fedrot.core.packed import Layout
from fedrot.core.seeding import generator
from fedrot.running.client import Round
from fedrot.running.network.messages import Message, MessageError
from fedrot.running.network.site import Site
from fedrot.running.network.tensors import read_upload, upload_message
from fedrot.running.recipe import Recipe
from fedrot.running.recipe_file import parse_recipe

FORM = first_adapter()
BROADCAST = Broadcast(2, FORM)
CODECS = ("none", "int8")
LARGEST = 50.0  # of an upload's norm


def many(count: int) -> settings:
    return settings(max_examples=count, deadline=None, database=None, derandomize=True)


@cache
def recipe(codec: str) -> Recipe:
    values: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"path": "d", "train": "t.csv"},
        "local": {"steps": 1},
        "partition": {"clients": 3},
        "checks": {"max_norm": LARGEST},
    }
    return parse_recipe({**values, "rounds": 5, "federation": {"compression": codec}})


@cache
def valid(codec: str) -> tuple[dict[str, Any], bytes]:
    """The header and the payload of a good upload, with rotations."""
    rng = generator("local")
    local = FORM.map(lambda tensor: tensor + 0.1 * torch.randn(tensor.shape, generator=rng))
    rotation = {"x": torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double(), "y": torch.eye(2).double()}
    packed = compress(local, FORM, Layout.of(FORM, ALL_PARTS), recipe(codec).federation.compression, generator(0))
    upload = Upload(
        "c",
        packed.adapter,
        held=5,
        used=4,
        rotation=rotation,
        metrics={"loss": 0.5, "steps": 2, "tokens": 40},
        layers=client_drift(local, FORM, rotation),
        seconds={"train": 0.5},
    )
    payload = None if codec == "none" else packed.payload
    message = upload_message(Round(upload, {}, local, payload), BROADCAST, recipe(codec))
    return json.loads(message.header_bytes()), message.payload.numpy().tobytes()


def bits(adapter: Adapter) -> bytes:
    return b"".join(tensor.numpy().tobytes() for _, tensor in adapter.tensors())


BEFORE = bits(FORM)


def row(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)


def said(problem: Exception) -> str:
    """A reason, which is a line that can be shown."""
    reason = str(problem)
    assert reason.isprintable()
    assert len(reason) < 400
    return reason


def arrives(header: bytes, payload: bytes, codec: str = "none") -> Upload | str:
    """The upload, which is then one that may touch the state, or why there is none. Nothing else is ever raised."""
    try:
        upload = read_upload(Message.from_parts(header, row(payload)), "c", BROADCAST, recipe(codec))
        check_upload(upload, FORM, recipe(codec).checks)
    except (MessageError, RejectedUpload) as problem:
        return said(problem)
    finally:
        assert bits(FORM) == BEFORE
    for name, tensor in upload.adapter.tensors():
        assert tensor.shape == dict(FORM.tensors())[name].shape
        assert bool(torch.isfinite(tensor).all())
    # All that goes into sums, log and report is plain numbers.
    reports = [upload.metrics, upload.seconds, *upload.layers.values()]
    assert all(abs(float(value)) < 2**53 for report in reports for value in report.values())
    assert 0 < upload.held < 2**53
    assert 0 < upload.used < 2**53
    return upload


@pytest.mark.parametrize("codec", CODECS)
def test_the_upload_that_is_spoiled_below_is_good(codec: str) -> None:
    header, payload = valid(codec)
    upload = arrives(json.dumps(header).encode(), payload, codec)
    assert isinstance(upload, Upload)
    assert upload.rotation.keys() == FORM.layers.keys()


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**53, 2**63, 10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=8)
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)


@st.composite
def spoiled_header(draw: st.DrawFn, codec: str) -> dict[str, Any]:
    """A good header in which values are replaced, removed, added or swapped, at any depth."""
    header: Any = json.loads(json.dumps(valid(codec)[0]))
    for _ in range(draw(st.integers(1, 3))):
        inside = header
        while True:
            key = draw(st.sampled_from(sorted(inside) or ["none"]))
            deeper = isinstance(inside.get(key), dict) and draw(st.booleans())
            if not deeper:
                break
            inside = inside[key]
        match draw(st.sampled_from(["replace", "remove", "add", "swap"])):
            case "replace":
                inside[key] = draw(junk)
            case "remove":
                inside.pop(key, None)
            case "add":
                inside[draw(st.text(max_size=6))] = draw(junk)
            case "swap":
                other = draw(st.sampled_from(sorted(inside) or [key]))
                inside[key], inside[other] = inside.get(other), inside.get(key)
    return header


@pytest.mark.parametrize("codec", CODECS)
def test_values_of_the_header_are_changed(codec: str) -> None:
    @many(1500)
    @given(spoiled_header(codec))
    def check(header: dict[str, Any]) -> None:
        arrives(json.dumps(header).encode(), valid(codec)[1], codec)

    check()


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_of_the_payload_are_changed(codec: str) -> None:
    header, good = json.dumps(valid(codec)[0]).encode(), valid(codec)[1]
    places = st.integers(0, len(good) - 1)

    @many(1500)
    @given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8))
    def check(changes: list[tuple[int, int]]) -> None:
        payload = bytearray(good)
        for place, byte in changes:
            payload[place] = byte
        arrives(header, bytes(payload), codec)

    check()


@pytest.mark.parametrize("codec", CODECS)
def test_a_payload_of_another_length_is_refused(codec: str) -> None:
    header, good = json.dumps(valid(codec)[0]).encode(), valid(codec)[1]

    @many(750)
    @given(st.integers(0, len(good)), st.binary(max_size=64))
    def check(end: int, more: bytes) -> None:
        payload = good[:end] + more
        if len(payload) != len(good):
            assert "payload" in str(arrives(header, payload, codec))

    check()


@many(1250)
@given(st.integers(0, 600), st.integers(0, 600), st.binary(max_size=16))
def test_pieces_of_the_header_s_bytes_are_replaced(start: int, length: int, more: bytes) -> None:
    header, payload = valid("none")
    text = json.dumps(header).encode()
    arrives(text[:start] + more + text[start + length :], payload)


@many(1250)
@given(st.binary(max_size=200) | junk.map(lambda value: json.dumps(value).encode()), st.binary(max_size=200))
def test_random_bytes_are_no_upload(header: bytes, payload: bytes) -> None:
    assert isinstance(arrives(header, payload), str)


@pytest.fixture(scope="module")
def joined(
    tiny_recipe: Callable[[], dict[str, Any]], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Site, Path, Message]:
    """A site after a round of a method that keeps state, its memory, and the request of the next round."""
    folder = tmp_path_factory.mktemp("joined")
    post = LocalPost(divide_files(tiny_data, folder / "sites"), folder / "memory")
    tiny = deployed(tiny_recipe(), post, "--method.name", "fedsa").play(2)
    assert tiny.records[1]["clients"]["dropped"] == {}
    request = next(r for c, r, _ in reversed(post.carried) if c == "music" and r.header["kind"] == "train")
    return post.sites["music"], post.memory / "music" / "run", request


def memory(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def answered(site: Site, header: bytes, payload: bytes) -> Message | None:
    """The reply; None where the bytes were no message, so that the site was not asked."""
    try:
        request = Message.from_parts(header, row(payload))
    except MessageError:
        return None
    reply = site.handle(request)
    assert isinstance(reply, Message)
    Message.from_parts(reply.header_bytes(), reply.payload)
    return reply


def test_a_site_answers_whatever_it_is_sent_and_keeps_what_it_kept(joined: tuple[Site, Path, Message]) -> None:
    site, folder, request = joined
    before, good = memory(folder), request.payload.numpy().tobytes()
    assert len(before) == 2
    kinds = st.sampled_from(["join", "train", "answer", "evaluate"])

    @many(400)
    @given(st.binary(max_size=200) | junk.map(lambda value: json.dumps(value).encode()), st.binary(max_size=200))
    def random_bytes(header: bytes, payload: bytes) -> None:
        reply = answered(site, header, payload)
        assert reply is None or reply.refused

    @many(400)
    @given(
        st.dictionaries(st.sampled_from([*request.header, "split", "limit", "recipe"]), junk, max_size=3),
        kinds,
        st.data(),
    )
    def changed(values: dict[str, Any], kind: str, data: st.DataObject) -> None:
        """Of a good request, but for a payload that is too short: none can be one that the site should train for."""
        header = {**request.header, "kind": kind, **values}
        reply = answered(site, json.dumps(header).encode(), good[: data.draw(st.integers(0, len(good) - 1))])
        assert reply is None or reply.refused

    random_bytes()
    changed()
    assert memory(folder) == before
    again = site.handle(request)
    assert again.refused is None
    assert memory(folder) == before
