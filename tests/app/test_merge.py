"""`fedrot merge`: adapters on disk to one, the error it states, PEFT's combinations, and what is refused."""

import re
from pathlib import Path

import pytest
import torch

from fedrot import Adapter, LoraPair
from fedrot.app.cli.main import main
from fedrot.core.aggregate import alike
from fedrot.core.errors import FedrotError
from fedrot.learning.peft_merge import COMBINATIONS, peft_combination


def adapter(seed: int, rank: int = 2, scale: float = 2.0, fan: bool = False) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    layers = {
        f"encoder.layer.{i}.query": LoraPair(
            torch.randn(rank, 5 + i, generator=rng), torch.randn(7, rank, generator=rng), scale, fan
        )
        for i in range(2)
    }
    return Adapter(layers, {"classifier.weight": torch.randn(2, 3, generator=rng)})


def update(one: Adapter) -> dict[str, torch.Tensor]:
    return {name: pair.delta().double() for name, pair in one.layers.items()}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Three adapters of different rank and alpha, and one to align to."""
    made = {"a": adapter(0), "b": adapter(1, rank=3, scale=0.5), "c": adapter(2, rank=1), "base": adapter(3, rank=3)}
    for name, one in made.items():
        one.save(tmp_path / name)
    return [str(tmp_path / name) for name in ("a", "b", "c")]


def numbers(text: str) -> list[float]:
    return [float(found) / 100 for found in re.findall(r"([\d.]+)%", text)]


def test_the_merged_adapter_has_the_error_that_is_said(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["merge", *folders, "--weights", "1,2,1", "--out", str(out)]) == 0
    said = numbers(capsys.readouterr().out)
    parts = [update(Adapter.load(folder)) for folder in folders]
    merged = update(Adapter.load(out))
    error2 = floor2 = ideal2 = 0.0
    for name in merged:
        ideal = sum(w * part[name] for w, part in zip((0.25, 0.5, 0.25), parts, strict=True))
        error2 += float((ideal - merged[name]).square().sum())
        floor2 += float(torch.linalg.svdvals(ideal)[3:].square().sum())
        ideal2 += float(ideal.square().sum())
    assert said[0] == pytest.approx((error2 / ideal2) ** 0.5, abs=1e-4)
    assert said[2] == pytest.approx((floor2 / ideal2) ** 0.5, abs=1e-4)
    assert said[0] == pytest.approx(said[2], abs=1e-4)  # fedrot_svd, the default, is at the floor


def test_a_base_change_comes_back_as_extra_rank_without_error(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("fedex", "flora"):
        out = tmp_path / method
        assert main(["merge", *folders, "--method", method, "--out", str(out)]) == 0
        assert numbers(capsys.readouterr().out)[0] == 0
        parts = [update(Adapter.load(folder)) for folder in folders]
        for name, found in update(Adapter.load(out)).items():
            ideal = sum(part[name] for part in parts) / 3
            assert torch.allclose(found, ideal, atol=1e-5)


def test_settings_and_reference_reach_the_method(folders: list[str], tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    for name, words in (("0", ["--strength", "0"]), ("1", ["--strength", "1", "--factor", "B"])):
        words += ["--method", "fedrot", "--reference", base, "--out", str(tmp_path / name)]
        assert main(["merge", *folders, *words]) == 0
    assert main(["merge", *folders, "--method", "fedit", "--out", str(tmp_path / "fedit")]) == 0
    plain, turned, fedit = (update(Adapter.load(tmp_path / name)) for name in ("0", "1", "fedit"))
    for name in fedit:
        assert torch.equal(plain[name], fedit[name])
        assert not torch.allclose(turned[name], fedit[name], atol=1e-3)


def test_a_run_folder_is_a_reference_as_it_is_an_adapter(folders: list[str], tmp_path: Path) -> None:
    adapter(3, rank=3).save(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "versions.json").write_text("{}")
    for name in ("base", "run"):
        words = ["--method", "fedrot", "--reference", str(tmp_path / name), "--out", str(tmp_path / f"to-{name}")]
        assert main(["merge", *folders, *words]) == 0
    found, again = (dict(Adapter.load(tmp_path / f"to-{name}").tensors()) for name in ("base", "run"))
    assert all(torch.equal(tensor, again[key]) for key, tensor in found.items())


def test_compare_lists_every_method_with_its_error(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", *folders, "--compare"]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert {"fedit", "fedrot_svd", "fedex", "peft_svd", "peft_ties", "the floor"} <= set(lines)
    assert "needs --reference" in lines["fedrot"]
    assert numbers(lines["peft_svd"]) == pytest.approx(numbers(lines["the floor"]), abs=1e-4)
    assert main(["merge", *folders, "--compare", "--reference", str(tmp_path / "base")]) == 0
    assert "needs" not in capsys.readouterr().out


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("name", ["peft_linear", "peft_svd"])
def test_pefts_combinations_are_what_they_are_said_to_be(name: str, fan: bool) -> None:
    parts, weights = [adapter(0, fan=fan), adapter(1, rank=3, scale=0.5, fan=fan)], [1.0, 3.0]
    found = peft_combination(parts, weights, name)
    wide = alike(parts)
    for layer, pair in found.layers.items():
        pairs = [(w / 4, one.layers[layer]) for w, one in zip(weights, wide, strict=True)]
        if name == "peft_linear":  # sqrt(w) A and sqrt(w) B are summed
            a = sum(w**0.5 * p.a for w, p in pairs)
            b = sum(w**0.5 * p.b * p.scale for w, p in pairs)
            ideal = b @ a
        else:
            u, s, vh = torch.linalg.svd(sum(w * p.scale * p.b @ p.a for w, p in pairs))
            ideal = (u[:, :3] * s[:3]) @ vh[:3]
        assert torch.allclose(pair.scale * pair.b @ pair.a, ideal, atol=1e-4)
    mean = sum(w * one.head["classifier.weight"] for w, one in zip((0.25, 0.75), parts, strict=True))
    assert torch.allclose(found.head["classifier.weight"], mean, atol=1e-6)


def test_dare_is_a_function_of_its_seed_and_leaves_other_randomness_alone() -> None:
    parts = [adapter(0), adapter(1)]
    before = torch.random.get_rng_state()
    first, again, other = (peft_combination(parts, [1, 1], "peft_dare_linear", 0.5, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(first.tensors(), again.tensors(), strict=True))
    assert any(not torch.equal(x, y) for (_, x), (_, y) in zip(first.tensors(), other.tensors(), strict=True))


def test_unknown_combination_and_density_are_refused() -> None:
    with pytest.raises(FedrotError, match="there is no combination 'peft_cat'"):
        peft_combination([adapter(0)], [1], "peft_cat")
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(FedrotError, match=r"density must be in \(0, 1\]"):
            peft_combination([adapter(0)], [1], "peft_ties", density)
    assert set(COMBINATIONS) >= {"peft_linear", "peft_svd", "peft_ties", "peft_dare_ties"}


def test_bad_calls_are_one_line(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, base = ["--out", str(tmp_path / "out")], str(tmp_path / "base")
    for words, text in (
        ([*folders], "give the folder of the merged adapter by --out"),
        ([*folders, *out, "--weights", "1,2"], "--weights has 2 numbers for 3 adapters"),
        ([*folders, *out, "--weights", "1,x,2"], "--weights must be numbers"),
        ([*folders, *out, "--weights", "1,-1,2"], "a weight must be positive"),
        ([*folders, *out, "--method", "nope"], "there is no method 'nope'"),
        ([*folders, *out, "--method", "ffa"], "needs training rounds"),
        ([*folders, *out, "--method", "fedrot"], "give reference="),
        ([*folders, *out, "--strength", "1"], "--strength: fedrot_svd has no such setting"),
        ([*folders, *out, "--method", "fedrot", "--strength", "2", "--reference", base], "strength must be in [0, 1]"),
        (
            [*folders, *out, "--method", "fedrot", "--strength", "x"],
            "method.strength must be a number or auto, got 'x'",
        ),
        ([*folders, *out, "--method", "peft_ties", "--density", "7"], "density must be in (0, 1]"),
        ([str(tmp_path / "none"), *out], "no such adapter folder"),
        ([*folders, "--out", folders[0]], "is there already"),
    ):
        assert main(["merge", *words]) == 2, words
        error = capsys.readouterr().err
        assert text in error, error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
