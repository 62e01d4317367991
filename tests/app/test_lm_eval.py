"""EleutherAI's lm-evaluation-harness, with the documentation's task file, scores an adapter as `fedrot eval` does."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from learning_helpers import write_jsonl
from model_folders import SIZES, write_model

from fedrot.app.cli.main import main
from fedrot.learning.tasks.answers import answer_of

TASKS = Path(__file__).parents[2] / "docs" / "lm-eval"
TOKENS = 12
TURNS = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAMES = ("Ada", "Bo", "Cy", "Di", "Ed")
BOOKS = [
    (name, n, {"question": f"{name} has {n} books and buys {n + 1} more. How many now?"})
    for name in NAMES
    for n in range(1, 6)
]
TRAIN = [row | {"answer": "who knows" if name == "Ed" else f"#### {2 * n + 1}"} for name, n, row in BOOKS]
# What is learnt is right, but for one count; of Ed no number is learnt.
TEST = [row | {"answer": f"so\n#### {2 * n + 1 + (n == 2)}"} for _, n, row in BOOKS]


def write_tokenizer(folder: Path, begins: bool) -> Path:
    """A byte-level BPE tokenizer learnt from the problems; where it `begins`, a text gets a first token by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([f"Question: {row['question']}\nAnswer: {row['answer']}" for row in TRAIN], trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    first = {"bos_token": "[CLS]"} if begins else {}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", chat_template=TURNS, **first)
    made.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Case:
    """A finished run in the folder of its data, and how its prompts are written."""

    folder: Path
    template: str

    @property
    def flags(self) -> list[str]:
        """What fedrot is told of the problems."""
        values = {"path": self.folder, "max_length": 80, "holdout": 0.2, "template": self.template}
        return [word for key, value in values.items() for word in (f"--data.{key}", str(value))]


@pytest.fixture(scope="module", params=[("plain", True), ("chat", False)], ids=["begins", "chat"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    template, begins = request.param
    folder = tmp_path_factory.mktemp("lm-eval")
    tokenizer = write_tokenizer(folder / "tokenizer", begins)
    write_model(folder / "base", "llama", tokenizer, causal=True, **SIZES["llama"], initializer_range=0.2)
    write_jsonl(folder / "train.jsonl", TRAIN)
    write_jsonl(folder / "test.jsonl", TEST)
    values = {
        "name": "books",
        "rounds": 1,
        "compute": {"threads": 1},
        "model": {"path": str(folder / "base")},
        "lora": {"rank": 16},
        "data": {"source": "gsm8k", "path": str(folder), "max_length": 80, "holdout": 0.2, "template": template},
        "partition": {"kind": "iid", "clients": 1},
        "local": {"lr": 0.01, "batch": 16, "steps": 60},
        "evaluation": {"tokens": TOKENS},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "run")]) == 0
    return Case(folder, template)


def harness(folder: Path, model: Any, **options: Any) -> tuple[float, list[dict[str, Any]]]:
    """(exact match, samples in their order) of the documentation's task, called in the folder that holds test.jsonl."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        found = simple_evaluate(model, tasks=["fedrot_gsm8k"], task_manager=tasks, bootstrap_iters=0, **options)
    samples = sorted(found["samples"]["fedrot_gsm8k"], key=lambda sample: sample["doc_id"])
    return float(found["results"]["fedrot_gsm8k"]["exact_match,number"]), samples


def by_fedrot(case: Case, capsys: pytest.CaptureFixture[str]) -> tuple[float, dict[int, tuple[list[int], str, float]]]:
    """(exact match, of each problem: the prompt's tokens, what is written after it, whether that is right), all of them
    as `fedrot eval` has them.
    """
    from fedrot.learning.evaluation import Scored
    from fedrot.learning.tasks import answers
    from fedrot.running import score

    write_on, by_answers = answers.write_on, answers.by_answers
    found: dict[int, tuple[list[int], str, float]] = {}
    asked: list[tuple[list[int], str]] = []

    def written(model: Any, prompts: Any, *how: Any) -> list[str]:
        texts = write_on(model, prompts, *how)
        asked.extend((prompt.tolist(), text) for prompt, text in zip(prompts, texts, strict=True))
        return texts

    def noted(*problems: Any) -> Scored:
        scored = by_answers(*problems)

        def measure(model: Any, adapter: Any, rows: Any) -> Any:
            numbers = scored.measure(model, adapter, rows)
            mine = zip(rows.tolist(), asked, numbers[:, 0].tolist(), strict=True)
            found.update({row: (prompt, text, right) for row, (prompt, text), right in mine})
            asked.clear()
            return numbers

        return Scored(scored.metric, measure, scored.score)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "write_on", written)
        patch.setattr(score, "by_answers", noted)
        assert main(["eval", str(case.folder / "run"), "--task", "gsm8k", *case.flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["exact_match"], found


def test_problem_by_problem_both_read_write_and_score_the_same(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval.models.huggingface import HFLM

    mine, outcomes = by_fedrot(case, capsys)
    base, adapter = str(case.folder / "base"), str(case.folder / "run" / "adapter")
    model = HFLM(base, peft=adapter, dtype="float32", device="cpu", batch_size=7)
    chat = case.template == "chat"
    theirs, samples = harness(case.folder, model, gen_kwargs={"max_gen_toks": TOKENS}, apply_chat_template=chat)
    for sample in samples:
        (prompt, _), (text,) = sample["arguments"][0], sample["resps"][0]
        tokens = model.tok_batch_encode([prompt])[0][0].tolist()
        assert (tokens, text, sample["exact_match"]) == outcomes[sample["doc_id"]]
    assert len(samples) == len(outcomes) == len(TEST)
    assert theirs == pytest.approx(mine)
    assert 0.3 < mine < 0.9


def test_a_number_is_read_alike_however_it_is_written(tmp_path: Path) -> None:
    from lm_eval.api.model import LM

    forms = ("{}", "${}", "{}.00", "0{}", "{}.", "{:,}", ".{}", "{}.50", "-{}", "-${}", "\n$ {}", "{} #### 3", "{},5")
    cases = [(n, f"so #### {form.format(n)} books") for n in (0, 5, 10, 50, -5, 1200) for form in forms]
    rng = random.Random(4)
    cases += [(rng.choice((0, 5, 51)), "####" + "".join(rng.choices("051,.$- ", k=4))) for _ in range(300)]

    class Says(LM):  # type: ignore[misc]
        def generate_until(self, requests: list[Any]) -> list[str]:
            return [cases[request.doc_id][1] for request in requests]

        loglikelihood = loglikelihood_rolling = generate_until

    write_jsonl(tmp_path / "test.jsonl", [{"question": "?", "answer": f"so\n#### {n:,}"} for n, _ in cases])
    score, samples = harness(tmp_path, Says())
    found = [(n, text, bool(sample["exact_match"])) for (n, text), sample in zip(cases, samples, strict=True)]
    assert found == [(n, text, answer_of(text, "number") == str(n)) for n, text in cases]
    assert 0.1 < score < 0.8
