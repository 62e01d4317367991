"""Runs with secure aggregation: the mean that uploads would give, the same bits in simulation and between sites."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from local_grid import LocalGrid, key_of
from network_sites import ONE_BY_ONE, LocalPost, deployed, divide_files, network
from tiny_runs import Tiny, assert_equal, assert_near, begin, cut_and_resumed, flat

from fedrot.app.progress import round_line
from fedrot.app.report.load import RunData
from fedrot.app.report.verdict import verdict
from fedrot.core.errors import RecipeError, RunError
from fedrot.core.methods import methods
from fedrot.running.engine import Failure
from fedrot.running.flower import GridPost
from fedrot.running.flower.seat import client_app
from fedrot.running.network import secure
from fedrot.running.network.messages import Message
from fedrot.running.network.site import Here, Site
from fedrot.running.prepare import prepare
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.secure import most_weight

QUICK = (*ONE_BY_ONE, "--evaluation.every", "9")
SECURE = ("--secure.aggregation", "true")
PRIVATE = ("--privacy.clip=1", "--privacy.noise=0.1", "--privacy.delta=0.1", "--federation.weighting=uniform")


@pytest.mark.parametrize("method", ["fedit", "fedrot", "ffa", "fedask"])
def test_the_sum_is_the_mean_of_the_uploads_wherever_the_clients_are(
    method: str, tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    flags = (*QUICK, "--method.name", method)
    plain, here = begin(tiny_values, *flags).play(2), begin(tiny_values, *flags, *SECURE).play(2)
    assert_near(flat(here.adapter), flat(plain.adapter), rel=1e-5)
    post = LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")
    there = deployed(tiny_values, over_flower(post) if method == "ffa" else post, *flags, *SECURE).play(2)
    assert_equal(there.adapter, here.adapter)
    for mine, theirs, open_ in zip(there.records, here.records, plain.records, strict=True):
        assert mine["clients"] == theirs["clients"] == open_["clients"]
        assert mine["secure"] == theirs["secure"] == {"clipped": 0.0}
        assert mine["train"] == theirs["train"]
        assert mine["train"]["loss"] == pytest.approx(open_["train"]["loss"], abs=1e-4)
        assert {key: mine["train"][key] for key in ("rows", "tokens")} == {
            "rows": 72,
            "tokens": open_["train"]["tokens"],
        }
        # Nothing is said of one client, and nothing that takes its factors.
        assert not {"loss_by_client"} & mine["train"].keys()
        assert not {"aggregation", "drift"} & (mine.keys() | theirs.keys())
    _nothing_of_one_client(post)


def over_flower(post: LocalPost) -> GridPost:
    """The same sites as nodes of a Flower grid."""
    grid = LocalGrid({name: client_app(site.handle) for name, site in post.sites.items()})
    return GridPost(grid, {key_of(name): name for name in post.sites}, pause=0.01)


def _nothing_of_one_client(post: LocalPost) -> None:
    """What sites sent in place of an upload says nothing but round, phase, session and names."""
    allowed = {"round", "phase", "session", "seeds", "keys"}
    for _, request, reply in post.carried:
        if request.header["kind"] in ("train", "answer", "share", "masked", "unmask"):
            assert set(reply.header) <= allowed


@pytest.mark.parametrize(
    "flags",
    [
        ("--method.name", "fedsa", "--lora.head", "personal"),
        ("--lora.ranks", '{"books": 1}', "--server.optimizer", "adam", "--lora.head", "frozen"),
        ("--privacy.mode", "local", *PRIVATE, "--local.prox", "0.1"),
        ("--privacy.mode", "example", *PRIVATE, "--method.name", "fedask", "--local.clip", "null"),
        ("--method.name", "as_published", "--local.steps", "null", "--local.epochs", "0.5"),
    ],
    ids=lambda flags: " ".join(flags).replace("--", ""),
)
def test_what_it_goes_with(
    flags: tuple[str, ...], tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    rounds = 2 if "fedsa" in flags else 1
    here = begin(tiny_values, *QUICK, *SECURE, *flags).play(rounds)
    post = LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")
    there = deployed(tiny_values, post, *QUICK, *SECURE, *flags).play(rounds)
    assert_equal(there.adapter, here.adapter)
    plain = begin(tiny_values, *QUICK, *flags).play(rounds)
    assert_near(flat(here.adapter), flat(plain.adapter), rel=1e-4)
    assert ("train" in there.records[0]) == ("train" in plain.records[0])


def four(values: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """The recipe's values with the same examples at four clients."""
    folder.mkdir()
    for path in data.glob("*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with (folder / path.name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "group": "abcd"[i % 4]} for i, row in enumerate(rows))
    return {**values, "data": {**values["data"], "path": str(folder)}}


@pytest.fixture
def post(tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path) -> LocalPost:
    """Four sites; the recipe's values are theirs from now on."""
    tiny_values |= four(tiny_values, tiny_data, tmp_path / "data")
    return LocalPost(divide_files(tmp_path / "data", tmp_path / "sites"), tmp_path / "memory")


def vanish(request: Message, reply: Message) -> None:
    return None


def test_clients_are_lost_in_both_phases(tiny_values: dict[str, Any], post: LocalPost) -> None:
    """Whose upload did not arrive, as where it failed in this process; and in the next round whose answer did not."""
    flags = (*QUICK, *SECURE, "--method.name", "fedask")
    here, there = begin(tiny_values, *flags), deployed(tiny_values, post, *flags)
    here.engine.faults["b"] = lambda upload: Failure("b", "lost")
    post.faults["b", "masked"] = vanish
    for tiny in (here, there):
        tiny.play()
        assert list(tiny.records[0]["clients"]["dropped"]) == ["b"]
    assert_equal(there.adapter, here.adapter)
    post.faults.clear()
    post.faults["c", "answer"] = vanish
    there.play()
    assert there.records[1]["clients"]["used"] == ["a", "b", "d"]
    assert there.records[1]["clients"]["dropped"] == {"c": "second phase: gave no answer (secure sum, stage ready)"}


def test_a_site_that_starts_again_within_a_sum_is_lost_for_it(tiny_values: dict[str, Any], post: LocalPost) -> None:
    flags = (*QUICK, *SECURE, "--method.name", "fedsa")
    here, there = begin(tiny_values, *flags), deployed(tiny_values, post, *flags)
    here.engine.faults["d"] = lambda upload: Failure("d", "lost")

    def restart(request: Message, reply: Message) -> Message:
        post.restart("d")
        return reply

    post.faults["d", "share"] = restart
    here.play()
    there.play()
    assert "must join first (secure sum, stage masked)" in there.records[0]["clients"]["dropped"]["d"]
    here.engine.faults.clear()
    post.faults.clear()
    assert_equal(there.play().adapter, here.play().adapter)
    assert there.records[1]["clients"]["dropped"] == {}


def test_too_few_end_the_run_and_it_is_taken_up_again(tiny_values: dict[str, Any], post: LocalPost) -> None:
    tiny = deployed(tiny_values, post, *QUICK, *SECURE).play()
    before = tiny.state
    post.faults = {(client, "masked"): vanish for client in "ab"}
    with pytest.raises(RunError, match=r"round 1: 0 of 4 uploads were usable, the quorum is 2") as caught:
        tiny.play()
    assert "c: the secure sum has 2 of 4 clients left and needs 3 (secure.fewest)" in str(caught.value)
    assert "a: gave no answer (secure sum, stage masked)" in str(caught.value)
    post.faults.clear()
    after = tiny.play().state
    # A server that restarts plays the round again, to the same bits; with others in it, no site helps.
    tiny.state = before
    assert_equal(tiny.play().adapter, after.broadcast.adapter)
    tiny.state, post.away = before, {"a"}
    with pytest.raises(RunError, match="has helped to open a sum of round 1 with other clients in it"):
        tiny.play()
    assert (post.memory / "b" / "run" / "sums.json").exists()


def test_a_run_that_is_cut_and_resumed(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    whole, cut = cut_and_resumed(tiny_values, tmp_path, *SECURE, "--method.name", "fedask")
    assert cut == whole


@pytest.mark.parametrize(
    "flags",
    [("--federation.weighting", "held"), ("--federation.weighting", "used", "--local.steps=null", "--local.epochs=1")],
    ids=["held", "used"],
)
def test_a_site_that_claims_more_than_a_sum_can_hold_is_kept_out_by_name(
    flags: tuple[str, ...], tiny_values: dict[str, Any], post: LocalPost
) -> None:
    """No more than its part of what it can hold, a quarter: the others, honest as they are, always fit in."""
    ready = prepare(parse_recipe(tiny_values, (*QUICK, *SECURE, *flags)))
    for claimed, refused in ((2**29 - 8, []), (2**29, ["d"]), (2**31, ["d"])):
        post.faults["d", "join"] = lambda request, reply, said=claimed: replace(
            reply, header={**reply.header, "examples": {"train": said}}
        )
        engine = network(ready, post)
        engine.join()
        assert list(engine.refused) == refused
    assert "has 2147483648 training examples, a weight of up to 2147483648" in engine.refused["d"]
    assert "each may have 536870911, unless federation.weighting is uniform" in engine.refused["d"]
    start = ready.recipe.method.start(ready.model.read())
    tiny = Tiny(ready.recipe, ready, engine, start).play()  # type: ignore[arg-type]
    assert tiny.records[0]["clients"] == {"drawn": 3, "used": ["a", "b", "c"], "dropped": {}}


# What is refused when the recipe is read.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--federation.compression", "int8"), "federation.compression: with secure.aggregation, "),
        (("--privacy.mode", "central", *PRIVATE), "privacy.mode: with secure.aggregation, the server cannot clip"),
        (("--robust.rule", "norm"), "robust.rule: with secure.aggregation, "),
        (("--local.scaffold", "true"), "local.scaffold: with secure.aggregation, "),
        (("--checks.max_norm", "1"), "checks.max_norm: with secure.aggregation, "),
        (("--federation.buffer", "2"), "federation.buffer: with secure.aggregation, "),
        (("--partition.kind", "iid", "--partition.clients", "2"), "secure.fewest: 2 clients are drawn for a round"),
        (("--secure.threshold", "0.5"), "secure.threshold must be above 0.5, at most 1"),
        (("--secure.fewest", "2"), "secure.fewest must be at least 3"),
        (("--secure.range", "0"), "secure.range must be positive"),
        (("--secure.neighbours", "5"), "secure.neighbours must be an even number of at least 4, or null"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_it_does_not_go_with(flags: tuple[str, ...], words: str, tiny_values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as found:
        parse_recipe(tiny_values, [*SECURE, *flags])
    assert words in str(found.value)
    assert "\n" not in str(found.value)


SUMMED = {name for name, method in methods().items() if method.capabilities.summed}


def test_methods_that_need_more_than_a_sum(tiny_values: dict[str, Any]) -> None:
    assert {"fedit", "fedrot", "ffa", "rolora", "fedsa", "fedask", "local"} <= SUMMED
    assert not {"flexlora", "fedex", "flora", "fedrot_svd", "centralised"} & SUMMED
    for name in ("flexlora", "centralised"):
        with pytest.raises(RecipeError, match=rf"secure\.aggregation: method {name} .*methods that work: .*fedask"):
            parse_recipe(tiny_values, [*SECURE, "--method.name", name])


# What a client checks, and what is said.


def test_a_change_beyond_the_range_is_cut_and_said(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *SECURE, "--secure.range", "0.001")
    before = flat(tiny.adapter)
    clipped = tiny.play().records[0]["secure"]["clipped"]
    assert 0.1 < clipped < 1
    moved = max(float((t - before[name]).abs().max()) for name, t in flat(tiny.adapter).items())
    assert moved == pytest.approx(0.001, rel=1e-3)


def test_an_upload_that_cannot_be_is_kept_out_by_its_own_client(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *SECURE, "--federation.quorum", "0.3")
    nan = replace(tiny.adapter, head={n: t * float("nan") for n, t in tiny.adapter.head.items()})
    tiny.engine.faults["films"] = lambda upload: replace(upload, adapter=nan)
    with pytest.raises(RunError, match=r"films: upload: head/.* holds values that are not finite"):
        tiny.play()


def test_no_client_can_weigh_more_than_it_is_counted_for(tiny_values: dict[str, Any]) -> None:
    for flags in (("--local.steps", "9"), ("--local.steps", "null", "--local.epochs", "1.3"), ("--local.batch", "500")):
        tiny = begin(tiny_values, "--federation.weighting", "used", *flags).play()
        for upload in tiny.engine.uploads:
            most, exact = most_weight(tiny.recipe, upload.held)
            assert upload.used <= most <= 1.2 * upload.used
            assert not exact


def test_a_site_that_takes_part_in_nothing_else(tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    site = Site(Here("books", tiny_data, secure=True), tmp_path / "memory")
    values = parse_recipe(tiny_values).to_dict()
    request = Message.of(kind="join", fedrot="0.1.0", run="run", recipe=values)
    assert site.handle(request).refused == "books takes part in runs with secure.aggregation only; set it to true"


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(secure, "import_module", missing)
    with pytest.raises(RunError, match=r"needs the package flwr; pip install 'fedrot\[flower\]'"):
        secure.require()


def test_the_report_says_that_there_are_no_diagnostics(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *SECURE).play()
    run = RunData("", Path(), tiny.recipe, list(map(dict, tiny.records)), {}, {}, {})
    assert verdict(run) == "What averaging lost is not available: with secure.aggregation nobody sees the uploads."
    assert "beyond" not in round_line(tiny.records[0], 3)
    assert "25.00% beyond secure.range" in round_line({**tiny.records[0], "secure": {"clipped": 0.25}}, 3)
