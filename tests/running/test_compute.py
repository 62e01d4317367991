"""How the arithmetic is done: what is chosen, that it is kept, and that it changes nothing but rounding."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import go, outcome
from model_folders import SIZES, write_model
from tiny_runs import assert_equal, assert_near, begin, cut_and_resumed, flat

from fedrot.core.adapter import Adapter
from fedrot.core.errors import RecipeError, RunError
from fedrot.learning import capacity
from fedrot.running.choices import adopted, for_machine
from fedrot.running.prepare import prepare
from fedrot.running.recipe_file import parse_recipe

SIX = ("--partition.kind=dirichlet", "--partition.clients=6", "--partition.minimum=3", "--lora.dropout=0.1")
WAYS = {
    "one by one": ("--compute.stack=1", "--compute.packing=false"),
    "packed": ("--compute.stack=1", "--compute.packing=true"),
    "stacked": ("--compute.stack=4", "--compute.packing=false"),
    "packed stacks": ("--compute.stack=4", "--compute.packing=true"),
    "in two workers": ("--compute.stack=2", "--compute.packing=true", "--compute.workers=2"),
}


def ways(values: Mapping[str, Any], *flags: str) -> dict[str, Any]:
    """Two rounds done in every way."""
    return {name: begin(values, *SIX, *flags, *way).play(2) for name, way in WAYS.items()}


@pytest.mark.parametrize("flags", [(), ("--lora.head=personal",), ("--method.name=flora",), ("--local.scaffold=true",)])
def test_a_recipe_gives_the_same_in_every_way(flags: tuple[str, ...], tiny_values: dict[str, Any]) -> None:
    """Plain SGD: AdamW would make of a gradient's rounding near zero a whole step."""
    sgd = ("--local.optimizer=sgd", "--local.lr=0.2")
    first, *others = ways(tiny_values, *sgd, *flags).values()
    for other in others:
        assert_near(flat(other.adapter), flat(first.adapter), rel=1e-4)
        for mine, theirs in zip(other.records, first.records, strict=True):
            assert mine["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-5)
            assert mine["train"]["tokens"] == theirs["train"]["tokens"]
            assert mine["train"]["rows"] == theirs["train"]["rows"]
            assert mine["evaluation"]["loss"] == pytest.approx(theirs["evaluation"]["loss"], rel=1e-5)
            assert mine["aggregation"]["before_relative"] == pytest.approx(
                theirs["aggregation"]["before_relative"], rel=1e-3
            )


@pytest.mark.parametrize("way", sorted(WAYS))
def test_the_same_settings_twice_give_the_same_bits(way: str, tiny_values: dict[str, Any]) -> None:
    one, other = (begin(tiny_values, *SIX, *WAYS[way]).play(2) for _ in range(2))
    assert_equal(one.adapter, other.adapter)
    assert [r["train"] for r in one.records] == [r["train"] for r in other.records]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_number_of_workers_changes_no_bit(workers: str, tiny_values: dict[str, Any]) -> None:
    """Which model serves a stack does not matter, not even in rounding."""
    one = begin(tiny_values, *SIX, "--compute.stack=2", "--compute.workers=2").play(2)
    other = begin(tiny_values, *SIX, "--compute.stack=2", f"--compute.workers={workers}").play(2)
    assert_equal(one.adapter, other.adapter)


def test_a_killed_run_of_stacks_in_two_workers_ends_in_the_same_bits(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    """Who takes part changes with the round, and so do the stacks: they are a function of the round alone."""
    flags = (*SIX, "--federation.participation=0.7", *WAYS["in two workers"])
    whole, resumed = cut_and_resumed(tiny_values, tmp_path, *flags)
    assert whole == resumed


@pytest.mark.parametrize("way", ["stacked", "packed stacks", "in two workers"])
def test_layers_that_are_computed_again_change_no_bit(way: str, tiny_values: dict[str, Any]) -> None:
    one, other = (
        begin(tiny_values, *SIX, *WAYS[way], f"--local.checkpointing={again}").play(2) for again in ("false", "true")
    )
    assert_equal(one.adapter, other.adapter)
    assert [r["train"] for r in one.records] == [r["train"] for r in other.records]


def test_checkpointing_is_refused_before_a_run_where_the_layers_cannot_be_told(
    tiny_values: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    albert = write_model(tmp_path, "albert", tiny_model, **SIZES["bert"], embedding_size=16)
    flags = [f"--model.path={albert}", "--lora.targets=[query]", "--compute.stack=2"]
    assert prepare(parse_recipe(tiny_values, flags)).recipe.compute.stack == 2
    with pytest.raises(RecipeError, match=r"local\.checkpointing.*albert"):
        prepare(parse_recipe(tiny_values, [*flags, "--local.checkpointing=true"]))


def test_a_change_of_the_base_reaches_every_worker(tiny_values: dict[str, Any]) -> None:
    one, other = (
        begin(tiny_values, *SIX, "--method.name=flora", "--compute.stack=1", f"--compute.workers={n}").play(3)
        for n in (1, 3)
    )
    assert_equal(one.adapter, other.adapter)
    assert one.records[-1]["evaluation"] == other.records[-1]["evaluation"]


def test_what_was_chosen_is_in_the_resolved_recipe_and_is_used_again(
    tiny_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = go(tiny_values, tmp_path / "run", "--rounds=2")
    chosen = folder.recipe().compute
    assert (chosen.device, chosen.packing, chosen.stack, chosen.workers) == ("cpu", True, 3, 1)
    before = outcome(tmp_path / "run")
    # Elsewhere, or with other memory, the choice would be another one; a run that goes on keeps its own.
    monkeypatch.setattr(capacity, "_ROWS", {"cpu": 1, "cuda": 1})
    assert prepare(parse_recipe(tiny_values)).recipe.compute.stack == 1
    go(tiny_values, tmp_path / "run", "--rounds=2", resume=True)
    assert outcome(tmp_path / "run") == before
    with pytest.raises(RunError, match=r"compute\.stack"):
        go(tiny_values, tmp_path / "run", "--rounds=2", "--compute.stack=2", resume=True)


def test_only_what_a_recipe_leaves_open_is_adopted(tiny_values: dict[str, Any]) -> None:
    resolved = parse_recipe(tiny_values, ["--compute.stack=7", "--compute.workers=3", "--compute.packing=false"])
    mine = parse_recipe(tiny_values, ["--compute.stack=2", "--local.precision=auto"])
    found = adopted(mine, resolved)
    assert (found.compute.stack, found.compute.workers, found.compute.packing) == (2, 3, False)
    assert found.local.precision == "fp32"


def test_a_stack_is_as_wide_as_full_matrix_products_need_and_memory_allows(tiny_values: dict[str, Any]) -> None:
    model = prepare(parse_recipe(tiny_values)).model.model
    each = capacity.activation_bytes(model)
    assert capacity.stack_width(model, 100.0, "cpu", 1 << 40) == 10
    assert capacity.stack_width(model, 100.0, "cuda", 1 << 50) == 327
    assert capacity.stack_width(model, 5000.0, "cpu", 1 << 40) == 1
    assert capacity.stack_width(model, 100.0, "cpu", 4 * 500 * each) == 5
    # Two layers of width 32 with a feed-forward part of 64; LoRA's own and the head's are small beside them.
    base = 6 * 2 * (4 * (32 + 32) + 2 * (32 + 64))
    assert base <= each <= 1.5 * base


@pytest.mark.parametrize(
    ("clients", "widest", "workers", "width"),
    [(10, 4, 1, 4), (10, 4, 2, 3), (10, 100, 1, 10), (10, 100, 2, 5), (3, 1, 2, 1), (1, 8, 4, 1), (1000, 4, 2, 4)],
)
def test_stacks_keep_every_worker_busy(clients: int, widest: int, workers: int, width: int) -> None:
    assert capacity.even_width(clients, widest, workers) == width


def test_padded_stacks_count_the_longest_example(tiny_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "_ROWS", {"cpu": 300, "cuda": 300})
    widths = [prepare(parse_recipe(tiny_values, [f"--compute.packing={p}"])) for p in ("true", "false")]
    lengths = widths[0].encoded["train"].lengths
    assert widths[0].recipe.compute.stack == int(300 / (8 * lengths.mean()))
    assert widths[1].recipe.compute.stack == int(300 / (8 * lengths.max()))


def test_precision_auto_is_what_the_machine_is_fast_at(
    tiny_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(tiny_values, ["--local.precision=auto"])
    for amx, avx, precision in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert for_machine(recipe).local.precision == precision
    assert for_machine(parse_recipe(tiny_values)).local.precision == "fp32"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--compute.device=cuda",), ["compute.device", "no GPU", "cpu"]),
        (("--compute.stack=0",), ["compute.stack", "from 1"]),
        (("--compute.workers=-1",), ["compute.workers", "from 1"]),
        (("--compute.threads=0",), ["compute.threads", "from 1"]),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(
    flags: tuple[str, ...], words: list[str], tiny_values: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(parse_recipe(tiny_values, flags))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_packing_an_unknown_architecture_is_refused_with_those_that_are_known(
    tiny_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedrot.learning import models

    monkeypatch.setattr(models, "packable", lambda model: False)
    with pytest.raises(RecipeError, match=r"compute\.packing: bert models cannot be packed.*llama"):
        prepare(parse_recipe(tiny_values, ["--compute.packing=true"]))
    assert prepare(parse_recipe(tiny_values)).recipe.compute.packing is False


def test_encoded_examples_are_mapped_from_a_file_that_leaves_nothing(
    tiny_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ready = prepare(parse_recipe(tiny_values))
    for data in ready.encoded.values():
        for array in (data.tokens, data.segments, data.offsets, data.labels):
            assert isinstance(array, np.memmap)
            assert not array.flags.writeable
    assert list(tmp_path.iterdir()) == []


def test_a_failed_client_in_a_worker_s_stack_is_dropped_alone(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *SIX, *WAYS["in two workers"])
    spoiled = tiny.adapter.map(lambda t: t * float("inf"))

    class Spoiled(type(tiny.recipe.method)):  # type: ignore[misc]
        def begin(self, broadcast: Any, seat: Any) -> Adapter:
            return spoiled if seat.name == "client-3" else broadcast.adapter

    object.__setattr__(tiny.recipe, "method", Spoiled())
    tiny.play()
    assert set(tiny.records[0]["clients"]["dropped"]) == {"client-3"}
    assert "the loss is" in tiny.records[0]["clients"]["dropped"]["client-3"]


@pytest.mark.parametrize("workers", [1, 2])
def test_uploads_of_many_clients_stream_into_the_sum(workers: int, tiny_values: dict[str, Any]) -> None:
    """Of sixty clients no more uploads live at once than the stacks that are being worked on have."""
    sizes = ("--partition.kind=iid", "--partition.clients=60", "--local.batch=2", "--local.steps=1")
    tiny = begin(tiny_values, *sizes, "--compute.stack=4", f"--compute.workers={workers}", "--diagnostics.every=0")
    alive = most = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    class Counted(type(tiny.recipe.method)):  # type: ignore[misc]
        def client(self, *args: Any) -> Any:
            nonlocal alive, most
            result = super().client(*args)
            weakref.finalize(next(iter(result.adapter.layers.values())).a, gone)
            alive += 1
            most = max(most, alive)
            return result

    tiny.engine.uploads = Forgetful()
    object.__setattr__(tiny.recipe, "method", Counted())
    tiny.play()
    assert len(tiny.records[0]["clients"]["used"]) == 60
    assert 0 < most <= 4 * (2 * workers + 1)


class Forgetful(list[Any]):
    """A list that keeps nothing."""

    def __iadd__(self, other: Any) -> "Forgetful":
        return self


def test_how_the_arithmetic_is_done_is_said_in_a_line(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    from fakes import Silent

    from fedrot.running.run import run

    watcher = Silent()
    run(parse_recipe(tiny_values, ["--rounds=1", "--compute.stack=2"]), tmp_path / "run", watcher)
    assert watcher.how.startswith("cpu, 1 worker of 1 thread, fp32")
    assert watcher.how.endswith("2 clients at once, packed examples")
