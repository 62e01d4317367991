"""What travels between sites is the tensors' own bytes, as a simulation counts them; rotations only to be measured."""

from pathlib import Path
from typing import Any

import pytest
from network_sites import LocalPost, deployed, divide_files
from tiny_runs import Tiny, assert_equal, begin

from fedrot.running.network.messages import Message

# Flags, and what an upload holds beside the adapter of round 2, in numbers of it: (control variates, rotations).
WAYS: dict[str, tuple[tuple[str, ...], int, bool]] = {
    "fedit": (("--method.name", "fedit"), 0, False),
    "fedrot": ((), 0, True),
    "fedrot, not measured": (("--diagnostics.every", "0"), 0, False),
    "fedrot, measured in other rounds": (("--diagnostics.every", "3"), 0, False),
    "variates": (("--method.name", "fedit", "--local.scaffold", "true"), 1, False),
}
OTHERS: dict[str, tuple[str, ...]] = {
    "two phases": ("--method.name", "fedask"),
    "one factor": ("--method.name", "ffa", "--lora.head", "personal"),
    "compressed": ("--federation.compression", "int8"),
}
ROTATIONS = 4 * 2 * 2 * 4  # four layers of rank 2, float32


@pytest.fixture
def post(tiny_data: Path, tmp_path: Path) -> LocalPost:
    return LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")


def play(values: dict[str, Any], post: LocalPost, *flags: str) -> Tiny:
    return deployed(values, post, *flags, "--rounds", "9", "--evaluation.every", "9").play(3)


def exchanged(post: LocalPost, number: int) -> list[tuple[Message, Message]]:
    """The requests of a round with their replies; what joining costs is of no round."""
    return [(asked, reply) for _, asked, reply in post.carried if asked.header.get("round") == number]


@pytest.mark.parametrize("way", [*WAYS, *OTHERS])
def test_bytes_are_those_that_the_records_of_a_simulation_say(
    way: str, tiny_values: dict[str, Any], post: LocalPost
) -> None:
    flags = WAYS[way][0] if way in WAYS else OTHERS[way]
    tiny = play(tiny_values, post, *flags)
    here = begin(tiny_values, *flags, "--rounds", "9", "--evaluation.every", "9").play(3)
    for number, record in enumerate(tiny.records):
        down, up = (sum(len(one.payload) for one in side) for side in zip(*exchanged(post, number), strict=True))
        assert record["bytes"] == {"down": down, "up": up} == here.records[number]["bytes"]
    if way in WAYS:
        _, variates, turned = WAYS[way]
        wanted = (1 + variates) * tiny.adapter.bytes() + (ROTATIONS if turned else 0)
        assert {len(reply.payload) for _, reply in exchanged(post, 2)} == {wanted}


def test_what_is_not_measured_costs_no_message_anything_and_changes_no_bit(
    tiny_values: dict[str, Any], post: LocalPost
) -> None:
    plain = play(tiny_values, post, "--method.name", "fedit")
    (_, fedit), *_ = exchanged(post, 2)
    post.carried.clear()
    quiet = play(tiny_values, post, "--diagnostics.every", "0")
    (_, fedrot), *_ = exchanged(post, 2)
    assert len(fedrot.payload) == len(fedit.payload) == plain.adapter.bytes() == quiet.adapter.bytes()
    assert (fedrot.header["turned"], fedrot.header["layers"]) == (False, {})
    assert fedit.header["layers"].keys() == plain.adapter.layers.keys()
    assert_equal(quiet.adapter, begin(tiny_values, "--compute.stack", "1").play(3).adapter)
