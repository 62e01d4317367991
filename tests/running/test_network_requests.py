"""What a site makes of odd requests and of its own faults: a refusal with the reason, and it is there for the next."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from network_faults import Known

from fedrot.running.network.messages import Message
from fedrot.running.simulation import Simulation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": None}, "kind must be of type str"),
        ({"kind": ["train"]}, "kind must be of type str"),
        ({"kind": "forget\n"}, "kind 'forget\\n' is not known"),
        ({"round": None}, "round must be of type int"),
        ({"round": -1}, "round must be a whole number"),
        ({"round": 10**400}, "round must be a whole number"),
        ({"round": 99}, "the recipe has 3 rounds"),
        ({"roles": "adapter"}, "roles must be of type list"),
        ({"roles": [["adapter"]]}, "the broadcast holds [['adapter']]"),
        ({"roles": ["reference"]}, "bytes, at least"),
        ({"schema": "0"}, "packs adapters of schema '0'"),
        ({"base": 5}, "change of the base cannot be read"),
        ({"base": {"bytes": -8}}, "bytes must be a whole number"),
        ({"base": {"bytes": 8}}, "bytes, at least"),
        ({"base": {"bytes": 0, "form": {}}}, "change of the base cannot be read"),
        ({"accepted": "yes"}, "accepted must be of type int"),
        ({"accepted": -1}, "accepted must be a whole number"),
        ({"kind": "answer", "round": 99}, "has nothing of round 99 to answer from"),
        ({"kind": "evaluate"}, "split must be of type str"),
        ({"kind": "evaluate", "split": ["test"]}, "split must be of type str"),
        ({"kind": "evaluate", "split": "secret"}, "has no split 'secret'"),
        ({"kind": "evaluate", "split": "test", "limit": 0}, "limit must be a whole number of at least 1"),
        ({"kind": "evaluate", "split": "test", "limit": True}, "limit must be of type int"),
        ({"kind": "evaluate", "split": "test", "limit": [1]}, "limit must be of type int"),
    ],
)
def test_a_site_refuses_what_it_cannot_answer(change: dict[str, Any], words: str, known: Known) -> None:
    sent = next(request for _, request, _ in known.post.carried if request.header["kind"] == "train")
    reply = known.post.sites["music"].handle(replace(sent, header={**sent.header, **change}))
    assert words in (reply.refused or "")
    assert not (known.post.memory / "music" / "run").exists()


def test_a_site_outlives_a_fault_of_its_own(
    known: Known, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server is told what kind of fault it was, the site's log has the rest."""

    def broken(self: Simulation, *args: Any) -> Any:
        raise ZeroDivisionError("a secret of the data")

    site = known.post.sites["music"]
    sent = next(r for client, r, _ in known.post.carried if client == "music" and r.header["kind"] == "train")
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "rounds", broken)
        assert site.handle(sent).refused == "music: ZeroDivisionError; the site's own log says where"
    assert "a secret of the data" in caplog.text
    assert site.handle(sent).refused is None


def test_where_a_site_keeps_things_is_not_said(known: Known, caplog: pytest.LogCaptureFixture) -> None:
    """A result that cannot be written is refused with its folder's name, in the site's own log."""
    sent = next(request for _, request, _ in known.post.carried if request.header["kind"] == "train")
    spoiled = sent.payload.clone()
    spoiled.view(torch.float32)[0] = float("nan")
    request = Message({**sent.header, "kind": "finish"}, spoiled)
    reply = known.post.sites["music"].handle(request)
    assert reply.refused == "music: cannot do what is asked; the site's own log says why"
    assert f"{known.post.memory / 'music' / 'run' / 'adapter'}: " in caplog.text
