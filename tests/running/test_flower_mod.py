"""`align_mod` in a Flower app that knows nothing of fedrot: products stay, frames come back, all else goes through."""

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from local_grid import LocalGrid
from torch import Tensor

from fedrot.running.flower import align_mod

LAYER = "base_model.model.layers.0.q_proj"
A, B, HEAD = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", "base_model.model.score.weight"


def state(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {A: (3, 8), B: (6, 3), HEAD: (2, 6)}
    return {key: torch.randn(shape, generator=rng) for key, shape in shapes.items()}


def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same update in another frame."""
    r, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    r = (r * torch.linalg.det(r).sign()).float()  # 3 is odd: of determinant one
    return {**tensors, A: r.T @ tensors[A], B: tensors[B] @ r}


def app(reply: dict[str, Tensor], *mods: Any) -> ClientApp:
    """One that answers every message with these arrays."""
    made = ClientApp(mods=list(mods))

    def answer(message: Message, context: Context) -> Message:
        content = RecordDict({"arrays": ArrayRecord(reply), "metrics": MetricRecord({"loss": 0.5})})
        return Message(content, reply_to=message)

    made.train()(answer)
    made.evaluate()(answer)
    return made


def send(to: ClientApp, arrays: dict[str, Tensor], round: int | None = 2, kind: str = "train") -> Message:
    content = RecordDict({"arrays": ArrayRecord(arrays)})
    if round is not None:
        content["config"] = ConfigRecord({"server-round": round})
    grid = LocalGrid({"client": to})
    (reply,) = grid.send_and_receive([Message(content, grid.numbers["client"], kind)])
    return reply


def arrays(reply: Message) -> dict[str, Tensor]:
    return dict(reply.content["arrays"].to_torch_state_dict())


def test_a_turned_update_comes_back_in_the_frame_that_was_sent() -> None:
    sent = state(0)
    reply = send(app(turned(sent), align_mod(strength=1.0)), sent)
    for key, tensor in arrays(reply).items():
        torch.testing.assert_close(tensor, sent[key], rtol=0, atol=1e-5)
    assert reply.content["metrics"]["loss"] == 0.5


@pytest.mark.parametrize("factor", ["alternate", "A", "B", "joint"])
@pytest.mark.parametrize("strength", [0.4, 1.0, "auto"])
def test_products_and_the_head_stay(factor: Any, strength: Any) -> None:
    sent, mine = state(0), state(1)
    found = arrays(send(app(mine, align_mod(factor=factor, strength=strength)), sent))
    torch.testing.assert_close(found[B] @ found[A], mine[B] @ mine[A], rtol=0, atol=1e-5)
    assert torch.equal(found[HEAD], mine[HEAD])
    assert list(found) == list(mine)


def test_the_factor_alternates_by_round_and_the_first_is_left_as_it_is() -> None:
    sent, mine = state(0), state(1)
    by_round = [arrays(send(app(mine, align_mod(strength=1.0)), sent, round)) for round in (1, 2, 3)]
    fixed = [arrays(send(app(mine, align_mod(factor=factor, strength=1.0)), sent)) for factor in ("A", "B")]
    assert torch.equal(by_round[0][A], mine[A])
    assert torch.equal(by_round[1][A], fixed[0][A])
    assert torch.equal(by_round[2][A], fixed[1][A])
    assert not torch.equal(fixed[0][A], fixed[1][A])


def test_half_precision_costs_what_it_did() -> None:
    mine = {key: tensor.half() for key, tensor in state(1).items()}
    found = arrays(send(app(mine, align_mod()), state(0)))
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}


def test_other_messages_and_errors_go_through() -> None:
    mine = state(1)
    assert torch.equal(arrays(send(app(mine, align_mod()), state(0), kind="evaluate"))[A], mine[A])
    broken = ClientApp(mods=[align_mod()])
    broken.train()(lambda message, _: Message(Error(code=3, reason="no"), reply_to=message))
    assert send(broken, state(0)).error.code == 3


@pytest.mark.parametrize(
    ("settings", "sent", "reply", "round", "words"),
    [
        ({}, state(0), state(1), None, "no number of the round, 'server-round'"),
        ({"arrays": "weights"}, state(0), state(1), 2, "has no ArrayRecord 'weights'; it has arrays"),
        ({}, {HEAD: state(0)[HEAD]}, state(1), 2, "the message holds no factors"),
        ({}, state(0), {A: state(1)[A]}, 2, "the reply has one factor of base_model.model.layers.0.q_proj alone"),
        ({}, state(0), {A: torch.ones(2, 8), B: torch.ones(6, 2)}, 2, "shape"),
    ],
)
def test_what_cannot_be_aligned_is_said(
    settings: dict[str, Any], sent: dict[str, Tensor], reply: dict[str, Tensor], round: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        send(app(reply, align_mod(**settings)), sent, round)


@pytest.mark.parametrize("settings", [{"strength": 2.0}, {"factor": "C"}, {"softening": "hard"}])
def test_settings_that_cannot_be_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        align_mod(**settings)
