"""`FedRotStrategy` in Flower's own loop: the apps know nothing of fedrot, and what they send wrongly harms nobody."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result
from local_grid import LocalGrid
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.diagnostics import exact_errors
from fedrot.core.errors import AdapterError, FedrotError, RecipeError, RunError
from fedrot.core.methods import methods
from fedrot.core.seeding import generator
from fedrot.core.settings import DiagnosticsSettings
from fedrot.running.flower import FedRotStrategy, align_mod
from fedrot.running.flower.state import read_state, write_state

State = dict[str, Tensor]
Reply = Callable[[int, State], RecordDict]  # of the round and of what was sent

Q, V = "base_model.model.layers.0.q_proj", "base_model.model.layers.0.v_proj"
HEAD = "base_model.model.score.weight"
SHAPES = {
    f"{Q}.lora_A.weight": (3, 8), f"{Q}.lora_B.weight": (6, 3),
    f"{V}.lora_A.weight": (3, 8), f"{V}.lora_B.weight": (4, 3), HEAD: (2, 6),
}  # fmt: skip
QA, QB = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
SERVED = ["fedit", "fedrot", "fedrot_consensus", "fedrot_svd", "flexlora", "flexlora_regauge", "hetlora", "lora_fair"]
QUIET = {"min_available_nodes": 1, "min_train_nodes": 1, "fraction_evaluate": 0.0}


def state(*seed: int, size: float = 1.0) -> State:
    rng = generator(*seed)
    return {key: size * torch.randn(shape, generator=rng) for key, shape in SHAPES.items()}


def turned(tensors: State, rng: torch.Generator) -> State:
    """The same updates in another frame."""
    found = dict(tensors)
    for layer in (Q, V):
        r, _ = torch.linalg.qr(torch.randn(3, 3, generator=rng, dtype=torch.float64))
        r = (r * torch.linalg.det(r).sign()).float()
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        found |= {a: (r.T @ found[a].float()).to(found[a].dtype), b: (found[b].float() @ r).to(found[b].dtype)}
    return found


def content(tensors: State, examples: Any = 1, **metrics: Any) -> RecordDict:
    """What an app replies."""
    return RecordDict({"arrays": ArrayRecord(tensors), "metrics": MetricRecord({"num-examples": examples, **metrics})})


def honest(client: int) -> Reply:
    """A client that moves what it was sent, turns it into a frame of its own, and has client + 1 examples."""

    def reply(round: int, sent: State) -> RecordDict:
        moved = {key: t + state(client, round, size=0.1)[key].to(t.dtype) for key, t in sent.items()}
        mine = turned(moved, generator(client, round, "turn"))
        return content(mine, client + 1, train_loss=float(client))

    return reply


def app(reply: Reply, *mods: Any) -> ClientApp:
    made = ClientApp(mods=list(mods))

    @made.train()
    def train(message: Message, context: Context) -> Message:
        sent = dict(message.content["arrays"].to_torch_state_dict())
        return Message(reply(int(message.content["config"]["server-round"]), sent), reply_to=message)

    return made


def play(strategy: FedAvg, *replies: Reply, rounds: int = 2, mods: tuple[Any, ...] = ()) -> tuple[Result, LocalGrid]:
    grid = LocalGrid({str(client): app(reply, *mods) for client, reply in enumerate(replies)})
    return strategy.start(grid, ArrayRecord(state(7)), rounds), grid


def arrays(result: Result) -> State:
    return dict(result.arrays.to_torch_state_dict())


HONEST = [honest(client) for client in range(3)]


def test_fedit_is_fedavg() -> None:
    ours, _ = play(FedRotStrategy("fedit", **QUIET), *HONEST)
    theirs, _ = play(FedAvg(**QUIET), *HONEST)
    assert list(arrays(ours)) == list(arrays(theirs))
    for key, tensor in arrays(theirs).items():
        torch.testing.assert_close(arrays(ours)[key], tensor)
    for round in (1, 2):
        mine, other = (r.train_metrics_clientapp[round] for r in (ours, theirs))
        assert mine["train_loss"] == pytest.approx(other["train_loss"])
        assert mine["fedrot-replies-used"] == 3


@pytest.mark.parametrize("strength", [0.7, "auto"])
def test_alignment_at_the_server_is_that_of_the_clients(strength: Any) -> None:
    mods = (align_mod(strength=strength),)
    here, _ = play(FedRotStrategy(strength=strength, **QUIET), *HONEST, rounds=3)
    there, _ = play(FedRotStrategy(align="client", **QUIET), *HONEST, rounds=3, mods=mods)
    published, _ = play(FedAvg(**QUIET), *HONEST, rounds=3, mods=mods)
    plain, _ = play(FedAvg(**QUIET), *HONEST, rounds=3)
    for key in SHAPES:
        torch.testing.assert_close(arrays(here)[key], arrays(there)[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(arrays(here)[key], arrays(published)[key], rtol=0, atol=1e-5)
    assert (arrays(here)[QA] - arrays(plain)[QA]).abs().max() > 0.05


def test_factors_that_align_mod_turned_are_not_turned_again() -> None:
    with pytest.raises(RunError, match=r"node 100: align_mod has turned it at the client: give .* align='client'"):
        play(FedRotStrategy(**QUIET), *HONEST, mods=(align_mod(),))
    play(FedRotStrategy("flexlora", **QUIET), *HONEST, mods=(align_mod(),))  # turns nothing itself


def test_flexlora_is_the_dense_svd() -> None:
    result, _ = play(FedRotStrategy("flexlora", **QUIET), *HONEST, rounds=1)
    replies = [dict(reply(1, state(7))["arrays"].to_torch_state_dict()) for reply in HONEST]
    for layer in (Q, V):
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        dense = sum((i + 1) / 6 * (r[b].double() @ r[a].double()) for i, r in enumerate(replies))
        u, s, vh = torch.linalg.svd(torch.as_tensor(dense), full_matrices=False)
        best = u[:, :3] * s[:3] @ vh[:3]
        torch.testing.assert_close((arrays(result)[b] @ arrays(result)[a]).double(), best, rtol=0, atol=1e-5)
    mean = sum((i + 1) / 6 * r[HEAD] for i, r in enumerate(replies))
    torch.testing.assert_close(arrays(result)[HEAD], torch.as_tensor(mean))
    metrics = result.train_metrics_clientapp[1]
    assert metrics["fedrot-error-sent"] == pytest.approx(metrics["fedrot-error-floor"], rel=1e-3)
    assert metrics["fedrot-error-sent"] < metrics["fedrot-error-before"]


def lying(tensor: Tensor) -> Array:
    """An array whose header claims a hundred thousand million numbers."""
    array = Array(tensor)
    return Array(array.dtype, array.shape, array.stype, array.data.replace(b"(3, 8)", b"(99999999999, 8)"))


def with_record(name: str, record: Any) -> RecordDict:
    made = content(state(3))
    made[name] = record
    return made


BAD: dict[str, tuple[Callable[[State], RecordDict], str]] = {
    "a key less": (lambda s: content({k: t for k, t in s.items() if k != HEAD}), "head tensor 'score.weight' is missi"),
    "a key more": (lambda s: content({**s, "x.weight": s[HEAD]}), "head tensor 'x.weight' is not in the reference"),
    "a layer less": (lambda s: content({k: t for k, t in s.items() if Q not in k}), "'layers.0.q_proj' is missing"),
    "one factor": (lambda s: content({k: t for k, t in s.items() if k != QB}), f"one factor of {Q} alone"),
    "twice": (lambda s: content({**s, f"{Q}.lora_A.default.weight": s[QA]}), "lora_A.default.weight' twice"),
    "another factor": (lambda s: content({**s, f"{Q}.lora_magnitude_vector": s[HEAD]}), "is not a plain LoRA factor"),
    "one row": (lambda s: content({**s, QA: s[QA][:1]}), "LoRA factors of different rank"),
    "rank one": (lambda s: content({**s, QA: s[QA][:1], QB: s[QB][:, :1]}), r"has shape \(1, 8\), the ref"),
    "a flat head": (lambda s: content({**s, HEAD: s[HEAD][0]}), r"head/score.weight has shape \(6,\)"),
    "no numbers": (lambda s: content({**s, HEAD: s[HEAD][:0]}), "has 0 bytes of numbers"),
    "float64": (lambda s: content({k: t.double() for k, t in s.items()}), "has dtype torch.float64"),
    "whole numbers": (lambda s: content({**s, HEAD: s[HEAD].long()}), "'base_model.model.score.weight' is 'int64'"),
    "NaN": (lambda s: content({**s, QA: s[QA] * torch.nan}), "not finite"),
    "infinite": (lambda s: content({**s, HEAD: s[HEAD] / 0}), "not finite"),
    "a lie": (lambda s: with_record("arrays", ArrayRecord({**ArrayRecord(s), QA: lying(s[QA])})), "its shape asks for"),
    "no array": (
        lambda s: with_record("arrays", ArrayRecord({**ArrayRecord(s), QA: Array("float32", (3, 8), "x", b"")})),
        "is not an array in numpy's format",
    ),
    "no examples": (lambda s: content(s, 0), "'num-examples' must be a positive number, got 0"),
    "minus one example": (lambda s: content(s, -1), "got -1"),
    "NaN examples": (lambda s: content(s, float("nan")), "got nan"),
    "a list of examples": (lambda s: content(s, [1, 2]), r"got \[1, 2\]"),
    "no weight": (lambda s: with_record("metrics", MetricRecord({"x": 1})), "got None"),
    "two records of arrays": (lambda s: with_record("more", ArrayRecord(s)), "one ArrayRecord, it holds 2"),
    "two records of metrics": (lambda s: with_record("more", MetricRecord({"x": 1})), "one MetricRecord, it holds 2"),
    "far away": (lambda s: content({k: t + 1e4 for k, t in s.items()}), "above checks.max_norm 1000"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_reply_is_dropped_alone_with_the_reason(what: str, caplog: pytest.LogCaptureFixture) -> None:
    make, words = BAD[what]
    settings = {"max_norm": 1e3, **QUIET}
    alone, _ = play(FedRotStrategy(**settings), *HONEST)
    spoiled, _ = play(FedRotStrategy(**settings), *HONEST, lambda round, sent: make(sent))
    for key, tensor in arrays(alone).items():
        assert torch.equal(arrays(spoiled)[key], tensor)
    assert [spoiled.train_metrics_clientapp[2][f"fedrot-replies-{x}"] for x in ("used", "dropped")] == [3, 1]
    dropped = [line for line in caplog.messages if "is dropped" in line]
    assert len(dropped) == 2
    assert all(re.search(f"the reply of node 103 is dropped: .*{words}", line) for line in dropped), dropped


def test_who_breaks_or_says_nothing_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    grid = LocalGrid({str(client): app(reply) for client, reply in enumerate(HONEST)})
    grid.broken, grid.silent = {"0"}, {"1"}
    result = FedRotStrategy(**QUIET).start(grid, ArrayRecord(state(7)), 1)
    only = dict(HONEST[2](1, state(7))["arrays"].to_torch_state_dict())
    assert all(torch.equal(arrays(result)[key], tensor) for key, tensor in only.items())
    assert "node 100 is dropped: Flower says: it broke (code 2)" in caplog.text
    assert "node 101 is dropped: gave no answer" in caplog.text


def test_a_round_without_a_usable_reply_changes_nothing_and_the_next_goes_on() -> None:
    def absent_in_round_two(reply: Reply) -> Reply:
        return lambda round, sent: content({"x": torch.ones(1)}) if round == 2 else reply(round, sent)

    result, grid = play(FedRotStrategy(**QUIET), *map(absent_in_round_two, HONEST), rounds=3)
    sent = [dict(m.content["arrays"].to_torch_state_dict()) for m in grid.sent[::3]]
    assert torch.equal(sent[2][QA], sent[1][QA])
    assert not torch.equal(sent[1][QA], sent[0][QA])
    assert not torch.equal(arrays(result)[QA], sent[2][QA])
    assert result.train_metrics_clientapp[2]["fedrot-replies-used"] == 0


def test_a_run_without_any_usable_reply_says_so() -> None:
    with pytest.raises(RunError, match=r"nothing was learned; in the last round: node 100: the reply holds no factors"):
        play(FedRotStrategy(**QUIET), lambda round, sent: content({"x": torch.ones(1)}))


def test_numbers_that_would_overflow_leave_the_arrays_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """The largest numbers of float16, whose products are none."""

    def huge(round: int, sent: State) -> RecordDict:
        return content({k: torch.full_like(t, 6e4) for k, t in sent.items()} if round == 2 else sent)

    half = ArrayRecord({key: t.half() for key, t in state(7).items()})
    grid = LocalGrid({"one": app(lambda round, sent: content(sent)), "two": app(huge)})
    result = FedRotStrategy("flexlora", **QUIET).start(grid, half, 2)
    assert torch.equal(arrays(result)[QA], dict(grid.sent[-1].content["arrays"].to_torch_state_dict())[QA])
    assert "with it the average is not finite" in caplog.text


@pytest.mark.parametrize("name", sorted(set(methods()) - set(SERVED)))
def test_methods_that_need_more_of_clients_are_refused_with_the_choices(name: str) -> None:
    with pytest.raises(RecipeError, match=f"method '{name}' .*; choose fedit, fedrot, .* or lora_fair"):
        FedRotStrategy(name)


@pytest.mark.parametrize("name", sorted(set(SERVED) - {"fedrot_consensus"}))
def test_no_result_depends_on_a_common_scale(name: str) -> None:
    plain, _ = play(FedRotStrategy(name, **QUIET), *HONEST)
    scaled, _ = play(FedRotStrategy(name, lora_config={"r": 3, "lora_alpha": 48}, **QUIET), *HONEST)
    for key, tensor in arrays(plain).items():
        torch.testing.assert_close(arrays(scaled)[key], tensor, rtol=0, atol=1e-4)
    for key, value in plain.train_metrics_clientapp[2].items():
        assert scaled.train_metrics_clientapp[2][key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_the_numerical_search_takes_other_steps_under_another_scale_to_the_same_error() -> None:
    plain, _ = play(FedRotStrategy("fedrot_consensus", **QUIET), *HONEST, rounds=1)
    scaled, _ = play(
        FedRotStrategy("fedrot_consensus", lora_config={"r": 3, "lora_alpha": 48}, **QUIET), *HONEST, rounds=1
    )
    errors = [result.train_metrics_clientapp[1]["fedrot-error-sent"] for result in (plain, scaled)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_layers_count_in_the_errors_by_their_scales() -> None:
    config = {"r": 3, "lora_alpha": 3, "alpha_pattern": {"v_proj": 30}}
    result, _ = play(FedRotStrategy("fedit", lora_config=config, **QUIET), *HONEST, rounds=1)
    adapters = []
    for reply in HONEST:
        found = dict(reply(1, state(7))["arrays"].to_torch_state_dict())
        pairs = {n: (found[f"{n}.lora_A.weight"], found[f"{n}.lora_B.weight"]) for n in (Q, V)}
        adapters.append(Adapter({Q: LoraPair(*pairs[Q], 1.0), V: LoraPair(*pairs[V], 10.0)}))
    layers = exact_errors(adapters, [1.0, 2.0, 3.0]).values()
    share = (sum(x["before2"] for x in layers) / sum(x["ideal2"] for x in layers)) ** 0.5
    metrics = result.train_metrics_clientapp[1]
    assert metrics["fedrot-error-before"] == pytest.approx(share)
    assert metrics["fedrot-error-sent"] == pytest.approx(share, rel=1e-3)
    assert metrics["fedrot-error-estimated"] == 0


def test_alignment_lowers_the_error_and_says_what_it_was() -> None:
    here, _ = play(FedRotStrategy(strength=1.0, factor="joint", **QUIET), *HONEST)
    first, second = here.train_metrics_clientapp[1], here.train_metrics_clientapp[2]
    assert first["fedrot-error-before"] == first["fedrot-error-after"]  # the first round is not turned
    assert second["fedrot-error-after"] < 0.5 * second["fedrot-error-before"]
    assert second["fedrot-error-sent"] == pytest.approx(second["fedrot-error-after"], rel=1e-3)
    there, _ = play(FedRotStrategy(align="client", **QUIET), *HONEST)
    assert "fedrot-error-before" not in there.train_metrics_clientapp[2]
    sketched, _ = play(FedRotStrategy(diagnostics=DiagnosticsSettings(exact_clients=2), **QUIET), *HONEST)
    assert sketched.train_metrics_clientapp[2]["fedrot-error-estimated"] == 1
    never, _ = play(FedRotStrategy(diagnostics=DiagnosticsSettings(every=0), **QUIET), *HONEST)
    assert not [key for key in never.train_metrics_clientapp[2] if "error" in key]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["", ".default"])
def test_dtypes_and_keys_are_kept(dtype: torch.dtype, suffix: str) -> None:
    """An app whose arrays come back as they went; numpy has no bfloat16, which travels as two bytes a number."""
    first = {key.replace(".weight", f"{suffix}.weight"): t.to(dtype) for key, t in state(7).items() if key != HEAD}
    bits = {key: Array(t.view(torch.int16).numpy().view("V2")) for key, t in first.items()}
    form = ArrayRecord({key: Array("bfloat16", a.shape, a.stype, a.data) for key, a in bits.items()})
    if dtype == torch.float16:
        form = ArrayRecord(first)
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        records = {"back": message.content["arrays"], "metrics": MetricRecord({"num-examples": 2})}
        return Message(RecordDict(records), reply_to=message)

    result = FedRotStrategy(**QUIET).start(LocalGrid({"one": client, "two": client}), form, 2)
    assert list(result.arrays) == list(first)
    assert [(a.dtype, a.shape) for a in result.arrays.values()] == [(a.dtype, a.shape) for a in form.values()]
    for layer, pair in read_state(result.arrays, "the test", head=True).layers.items():
        for side, tensor in (("A", pair.a), ("B", pair.b)):
            sent = first[f"base_model.model.{layer}.lora_{side}{suffix}.weight"]
            assert tensor.dtype == dtype
            torch.testing.assert_close(tensor, sent, rtol=0, atol=0.05)  # turned and turned back, in half precision


def test_arrays_of_columns_are_read_as_they_are() -> None:
    tensors = state(1)
    record = ArrayRecord({key: Array(t.numpy().copy(order="F")) for key, t in tensors.items()})
    assert b"'fortran_order': True" in record[QA].data
    back = write_state(read_state(record, "the test", head=True), record).to_torch_state_dict()
    assert all(torch.equal(back[key], t) for key, t in tensors.items())


def test_odd_metrics_cost_nothing_but_themselves(caplog: pytest.LogCaptureFixture) -> None:
    def odd(round: int, sent: State) -> RecordDict:
        return content(sent, 4, train_loss=float("nan"), more=[1.0, 2.0])

    result, _ = play(FedRotStrategy(**QUIET), *HONEST, odd)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["train_loss"] == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)
    assert metrics["more"] == [1.0, 2.0]
    assert metrics["fedrot-replies-used"] == 4

    def picky(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"more": sum(c["metrics"]["more"][0] for c in contents)})

    result, _ = play(FedRotStrategy(train_metrics_aggr_fn=picky, **QUIET), *HONEST, odd)
    assert "more" not in result.train_metrics_clientapp[1]
    assert "the clients' metrics are left out: KeyError" in caplog.text


def test_evaluation_goes_on_without_bad_replies_and_without_nodes(caplog: pytest.LogCaptureFixture) -> None:
    def judge(score: Any) -> ClientApp:
        made = app(honest(0))
        made.evaluate()(
            lambda message, _: Message(
                RecordDict({"metrics": MetricRecord({"num-examples": 1, "accuracy": score} if score else {})}),
                reply_to=message,
            )
        )
        return made

    grid = LocalGrid({"good": judge(0.5), "better": judge(1.0), "bad": judge(None)})
    strategy = FedRotStrategy(patience=0.0)
    result = strategy.start(grid, ArrayRecord(state(7)), 1)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.75)
    assert "evaluation of round 1: the reply of node 102 is dropped" in caplog.text
    grid.gone = {"good", "better"}
    assert list(strategy.configure_evaluate(2, ArrayRecord(state(7)), ConfigRecord(), grid)) == []
    assert "round 2 is not evaluated: 1 nodes are connected after 0 s, 2 are needed" in caplog.text
    with pytest.raises(RunError, match="round 1: 1 nodes are connected after 0 s, 2 are needed"):
        strategy.start(grid, ArrayRecord(state(7)), 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "fedavg"}, "there is no method 'fedavg'; choose"),
        (
            {"strenght": 0.4},
            "'strenght' is a setting neither of method 'fedrot', which has factor, guard, softening or",
        ),
        (
            {"method": "fedit", "strength": 0.4},
            "'strength' is a setting neither of method 'fedit', which has none, nor",
        ),
        ({"strength": 2.0}, r"method.strength must be in \[0, 1\]"),
        ({"guard": "yes"}, "method.guard must be true or false, got 'yes'"),
        ({"align": "both"}, "align must be client or server, got 'both'"),
        ({"max_norm": 0.0}, "max_norm must be above 0"),
        ({"lora_config": 16}, "lora_config must be PEFT's LoraConfig or a mapping, got 16"),
        ({"lora_config": {"use_dora": True}}, "lora_config: use_dora is True; only plain LoRA"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(FedrotError, match=words):
        FedRotStrategy(**settings)


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({HEAD: torch.ones(2, 6, dtype=torch.float64)}, {}, "head/score.weight is float64; send float32"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(6)}, {}, "lora_magnitude_vector' is not a plain LoRA factor"),
        ({QA: torch.full((3, 8), torch.inf)}, {}, "not finite"),
        ({}, {"lora_config": {"r": 4}}, "layers.0.q_proj has rank 3, lora_config gives it rank 4"),
    ],
)
def test_arrays_that_are_no_adapter_s_are_refused_before_anything_is_sent(
    change: State, settings: dict[str, Any], words: str
) -> None:
    grid = LocalGrid({"one": app(honest(0))})
    with pytest.raises(AdapterError, match=words):
        FedRotStrategy(**settings, **QUIET).start(grid, ArrayRecord({**state(7), **change}), 1)
    assert grid.sent == []


def test_what_a_method_remembers_goes_from_round_to_round_and_no_further() -> None:
    strategy = FedRotStrategy("fedrot_svd", momentum=0.9, **QUIET)
    first, _ = play(strategy, *HONEST)
    second, _ = play(strategy, *HONEST)
    without, _ = play(FedRotStrategy("fedrot_svd", **QUIET), *HONEST)
    assert torch.equal(arrays(first)[QA], arrays(second)[QA])
    assert not torch.allclose(arrays(first)[QB] @ arrays(first)[QA], arrays(without)[QB] @ arrays(without)[QA])
