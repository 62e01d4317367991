"""A language model from the command line: run, compared, reported, scored on GSM8K and on HumanEval's form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_folders import SIZES, write_model

from fedrot.app.cli.main import main

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama", tiny_model, causal=True, **SIZES["llama"])


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    words = ["good", "bad", "film", "book", "warm", "dull", "day", "plot"]
    rows = [
        {"text": f"the {a} {b}", "response": f"very {b}", "site": a} for a in words[:3] for b in words for _ in "123"
    ]
    jsonl(folder / "train.jsonl", rows)
    values = {
        "name": "words",
        "rounds": 2,
        "compute": {"threads": 1},
        "model": {"path": str(llama)},
        "lora": {"rank": 2},
        "data": {
            "path": str(folder),
            "train": "train.jsonl",
            "validation": "train.jsonl",
            "test": "train.jsonl",
            "response": "response",
            "group": "site",
            "max_length": 32,
        },
        "partition": {"kind": "column"},
        "local": {"lr": 0.02, "batch": 4, "steps": 3},
        "evaluation": {"final": "test", "answers": "text", "problems": 6, "tokens": 4},
    }
    path = folder / "words.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "words"
    assert main(["run", str(recipe), "--out", str(out)]) == 0
    return out


def test_a_run_reports_loss_by_round_and_exact_match_at_the_end(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["final"]["metric"] == "loss"
    assert result["final"]["examples"] == result["answers"]["examples"] == 6
    assert 0 <= result["answers"]["low"] <= result["answers"]["exact_match"] <= result["answers"]["high"] <= 1
    page = (finished / "report.html").read_text()
    assert "exact match" in page
    losses = [json.loads(line)["evaluation"]["loss"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]


def test_the_adapter_gives_the_same_logits_in_plain_transformers_and_peft(finished: Path, llama: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM

    from fedrot.core.adapter import Adapter
    from fedrot.learning.loading import load_model
    from fedrot.learning.settings import LoraSettings, ModelSettings

    theirs = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter").eval()
    ours = load_model(ModelSettings(str(llama)), LoraSettings(rank=2), (), 5)
    ours.write(Adapter.load(finished / "adapter"))
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, ours.logits(inputs, "fp32"), rtol=1e-5, atol=1e-6)


def test_a_comparison_of_language_models_has_its_table_and_figures(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(recipe), "--methods", "fedit,fedrot", "--seeds", "0,1", "--out", str(tmp_path / "both")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "test exact match" in out
    assert "target loss" in out
    assert (tmp_path / "both" / "figures" / "score.png").stat().st_size > 10_000


def test_eval_scores_loss_and_gsm8k(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished), "--split", "validation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "loss"
    for split in ("train", "test"):
        jsonl(
            tmp_path / f"{split}.jsonl", [{"question": f"the day {i}", "answer": f"good #### {i}"} for i in range(20)]
        )
    flags = [
        "--data.path",
        str(tmp_path),
        "--limit",
        "5",
        "--evaluation.tokens",
        "4",
        "--data.max_length",
        "64",
        "--json",
    ]
    assert main(["eval", str(finished), "--task", "gsm8k", *flags]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["metric"], scores["examples"], scores["unparsed"]) == ("exact_match", 5, 1.0)


def prompts_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What a command asks the model, in the order of the lengths."""
    from fedrot.learning.tasks import answers

    asked: list[list[int]] = []
    write_on = answers.write_on

    def spy(model: Any, prompts: Any, *rest: Any) -> list[str]:
        asked.extend(prompt.tolist() for prompt in prompts)
        return write_on(model, prompts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "write_on", spy)
        assert main(words) == 0
    return sorted(asked, key=len)


def test_worked_examples_come_before_a_run_s_problems_and_cut_prompts_are_reported(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for shots in (0, 2, 30):
        out = tmp_path / str(shots)
        words = ["run", str(recipe), "--rounds=1", f"--evaluation.shots={shots}", "--out", str(out)]
        asked = prompts_of(words, monkeypatch)
        answers = json.loads((out / "result.json").read_text())["answers"]
        found[shots] = asked, answers["cut"], caplog.text
    few, cut, log = found[2]
    assert {len(more) - len(less) for more, less in zip(few, found[0][0], strict=True)} == {2 * 5}
    assert len({tuple(prompt[:10]) for prompt in few}) == 1
    assert cut == found[0][1] == 0.0
    assert "lost their beginning" not in log
    assert found[30][1] == 1.0
    assert "6 of 6 prompts" in found[30][2]


def test_worked_examples_come_before_the_problems_of_eval(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for split, word in (("train", "good"), ("test", "bad")):
        rows = [{"question": f"the {word} day {i}", "answer": f"{word} #### {i}"} for i in range(20)]
        jsonl(tmp_path / f"{split}.jsonl", rows)
    words = ["eval", str(finished), "--task", "gsm8k", "--data.path", str(tmp_path), "--limit", "5", "--json"]
    words += ["--evaluation.tokens", "4", "--data.max_length", "64"]
    none = prompts_of(words, monkeypatch)
    assert json.loads(capsys.readouterr().out)["cut"] == 0.0
    few = prompts_of([*words, "--evaluation.shots", "2"], monkeypatch)
    assert json.loads(capsys.readouterr().out)["cut"] == 0.0
    assert all(more[-len(less) :] == less for more, less in zip(few, none, strict=True))
    assert len({tuple(more[: -len(less)]) for more, less in zip(few, none, strict=True)}) == 1
    prompts_of([*words, "--evaluation.shots", "12"], monkeypatch)
    assert json.loads(capsys.readouterr().out)["cut"] == 1.0
    assert "5 of 5 prompts" in caplog.text
    assert main([*words, "--evaluation.shots", "21"]) == 2
    assert "evaluation.shots is 21" in capsys.readouterr().err
    assert main([*words, "--evaluation.shots", "2", "--split", "train"]) == 2
    assert "evaluation.shots" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluation.shots=-1"], "at least 0"),
        (["--evaluation.shots=2", "--evaluation.answers=none"], "evaluation.answers"),
        (["--evaluation.shots=2", "--evaluation.final=train"], "another split"),
        (["--evaluation.shots=2", "--evaluation.final=null", "--evaluation.split=train"], "another split"),
        (["--evaluation.shots=1000"], "training examples"),
    ],
)
def test_worked_examples_that_cannot_be_given_are_refused(
    recipe: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe), *flags, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "evaluation.shots" in err
    assert message in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_answers_that_leave_no_place_for_a_prompt_are_refused_before_anything_is_trained(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe), "--evaluation.tokens=80", "--out", str(tmp_path / "run")]) == 2
    assert "evaluation.tokens is 80" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_eval_runs_generated_programs_only_when_told_to(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl(
        tmp_path / "HumanEval.jsonl",
        [{"task_id": "T", "prompt": "def f():\n", "test": "def check(f): f()", "entry_point": "f"}] * 3,
    )
    words = ["eval", str(finished), "--task", "humaneval", "--data.path", str(tmp_path), "--evaluation.tokens", "4"]
    assert main(words) == 2
    assert "--run-generated-code" in capsys.readouterr().err
    assert main([*words, "--run-generated-code", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["metric"], scores["examples"], scores["pass_at_1"], scores["failed"]) == ("pass_at_1", 3, 0.0, 3)
    assert main([*words[:-1], "80", "--run-generated-code"]) == 2
    err = capsys.readouterr().err
    assert "evaluation.tokens is 80" in err
    assert err.count("\n") == 1


def test_answers_are_refused_where_there_are_labels(
    tiny_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "labels.yaml"
    path.write_text(yaml.safe_dump({**tiny_values, "evaluation": {"answers": "number"}}))
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "evaluation.answers" in capsys.readouterr().err


def test_an_adapter_merged_into_its_base_gives_the_same_logits_without_peft(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["merge", str(finished), "--into-base", "--out", str(tmp_path / "whole")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    apart = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "whole")("the good film", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        found, wanted = whole(**inputs).logits, apart(**inputs).logits
        with apart.disable_adapter():
            assert not torch.allclose(apart(**inputs).logits, wanted, atol=1e-3)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert main(["merge", str(finished), "--into-base", "--out", str(tmp_path / "whole")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_classifier_is_merged_into_its_base_with_its_head_in_the_revision_it_was_trained_on(
    tiny_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path, revisions = tmp_path / "tiny.yaml", []
    path.write_text(yaml.safe_dump(tiny_values))
    assert main(["run", str(path), "--model.revision", "v1.0", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["revision"] == "v1.0"
    load = AutoTokenizer.from_pretrained

    def noted(folder: str, revision: str | None = None, **options: Any) -> Any:
        revisions.append(revision)
        return load(folder, revision=revision, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", noted)
        for out, base in (("whole", []), ("other", ["--base", tiny_values["model"]["path"]])):
            words = ["merge", str(tmp_path / "run"), "--into-base", *base, "--out", str(tmp_path / out)]
            assert main(words) == 0
    assert revisions == ["v1.0", None]
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    apart = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter", num_labels=2).eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 7, 3]])}
    with torch.no_grad():
        torch.testing.assert_close(whole(**inputs).logits, apart(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_classifier_with_a_layer_before_its_output_is_merged_into_its_base(tiny_model: Path, tmp_path: Path) -> None:
    """DistilBERT's pre_classifier is saved with the adapter too, and has as many rows as the model is wide."""
    import torch
    from learning_helpers import resident, shaken
    from transformers import AutoModelForSequenceClassification

    from fedrot.learning.into_base import merge_into_base

    folder = write_model(tmp_path / "base", "distilbert", tiny_model, **SIZES["distilbert"])
    model = resident(folder, targets=["q_lin"], labels=("a", "b", "c"))
    model.write(shaken(model.read()))
    model.read().save(tmp_path / "adapter")
    merge_into_base(tmp_path / "adapter", tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 7, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(whole(**inputs).logits, model.logits(inputs, "fp32"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--into-base"], "--out"),
        (["--base", "x", "--out", "y"], "--into-base"),
        (["x", "--into-base", "--out", "y"], "one adapter"),
    ],
)
def test_what_cannot_be_merged_into_a_base_is_refused(
    finished: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(finished), *words]) == 2
    assert message in capsys.readouterr().err
