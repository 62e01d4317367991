"""A site loads its base model once in the life of its process: however long that takes, rounds do not pay for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import Silent
from network_sites import ONE_BY_ONE, LocalPost, deployed, divide_files, network, values_of
from transformers import PreTrainedModel

from fedrot.running.network.messages import Message
from fedrot.running.network.opening import between_sites
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.run import run

SITES = ["books", "films", "music"]
LOAD = "load"


class Ended(BaseException):
    """The server's process ends here."""


class Noted(Silent):
    """Puts rounds down among the loads."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def round_started(self, round: int, rounds: int, clients: Sequence[str]) -> None:
        self._events.append(f"round {round}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line whenever any weights are loaded, by whoever it is."""
    found: list[str] = []
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def noted(cls: type, *args: Any, **kwargs: Any) -> Any:
        found.append(LOAD)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(noted))
    return found


@pytest.fixture
def post(tiny_data: Path, tmp_path: Path) -> LocalPost:
    return LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")


def test_models_are_loaded_before_the_first_round_and_not_again_when_the_server_restarts(
    tiny_values: dict[str, Any], post: LocalPost, tmp_path: Path, events: list[str]
) -> None:
    asked = values_of(tiny_values, data={"labels": ["negative", "positive"], "path": None}, rounds=4)

    def serve(resume: bool) -> None:
        opened = between_sites(post, SITES, 0.0)
        run(parse_recipe(asked, ONE_BY_ONE), tmp_path / "out", Noted(events), resume=resume, open_stage=opened)

    def ends(request: Message, reply: Message) -> Message:
        if request.header["round"] == 2:
            raise Ended
        return reply

    post.faults["books", "train"] = ends
    with pytest.raises(Ended):
        serve(resume=False)
    post.faults.clear()
    serve(resume=True)
    kinds = [request.header["kind"] for _, request, _ in post.carried]
    assert (kinds.count("join"), kinds.count("evaluate")) == (6, 15)  # after each round, and at the end
    # The server's own and three sites'; then the next server's own alone.
    assert events == [*[LOAD] * 4, "round 0", "round 1", "round 2", LOAD, "round 2", "round 3"]


def test_only_a_site_whose_process_was_started_again_loads_again(
    tiny_values: dict[str, Any], post: LocalPost, events: list[str]
) -> None:
    tiny = deployed(tiny_values, post).play()
    before = len(events)
    network(tiny.ready, post).join()  # another server of the same run
    tiny.play()
    assert len(events) == before
    post.restart("films")
    tiny.play()
    assert len(events) == before + 1
    assert tiny.records[-1]["clients"]["dropped"] == {}
