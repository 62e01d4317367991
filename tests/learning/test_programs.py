"""HumanEval's problems: read, completed, and scored by what their tests say in the sandbox."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from learning_helpers import refused, write_jsonl, write_lines

from fedrot.learning.fetch import fetch
from fedrot.learning.sandbox import Limits
from fedrot.learning.tasks.programs import Problem, pass_at_1, read_problems

ROW: dict[str, Any] = {
    "task_id": "T/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
DOUBLE = Problem("T/0", ROW["prompt"], ROW["test"], "double")


def test_only_completions_that_pass_all_tests_count() -> None:
    written = [
        "    return 2 * x\n",
        "    return x * x\n",
        "    while True: pass\n",
        "    return 2 *\n",
        "    import os; os._exit(0)\n",
        "    return x + x\n",
    ]
    found = pass_at_1([DOUBLE] * 6, written, limits=Limits(seconds=2.0))
    assert (found.problems, found.passed) == (6, 2)
    assert found.outcomes == {"passed": 2, "failed": 3, "timeout": 1}
    record = found.record()
    assert record["pass_at_1"] == pytest.approx(1 / 3)
    assert (record["failed"], record["timeout"]) == (3, 1)
    assert 0.05 < found.low < 1 / 3 < found.high < 0.75


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_problems_are_read_from_a_file_or_its_folder(tmp_path: Path, name: str) -> None:
    text = json.dumps(ROW) + "\n"
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / name).write_text(text)
    assert read_problems(tmp_path / name) == read_problems(tmp_path) == [DOUBLE]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task_id": "x", "pro', "line 2"),
        ('{"task_id": "x"}', "line 2"),
        (json.dumps({**ROW, "test": ""}), "line 2 has an empty"),
        (json.dumps({**ROW, "entry_point": "f(1); g"}), "line 2 has an empty or malformed"),
        ("[]", "line 2"),
    ],
)
def test_a_line_that_is_no_problem_is_refused_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "HumanEval.jsonl", [json.dumps(ROW), line])
    with refused(str(path), message):
        read_problems(path)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with refused("nowhere.jsonl"):
        read_problems(tmp_path / "nowhere.jsonl")
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b"x" * 100)[:20])
    with refused("HumanEval.jsonl.gz"):
        read_problems(tmp_path)
    with refused("no problems"):
        read_problems(write_jsonl(tmp_path / "empty.jsonl", []))


def test_the_published_solutions_pass_the_published_tests() -> None:
    """All of HumanEval, with its own solutions: the sandbox is in nobody's way."""
    path = fetch("humaneval")
    problems = read_problems(path)
    with gzip.open(path / "HumanEval.jsonl.gz", "rt") as file:
        solutions = [json.loads(line)["canonical_solution"] for line in file]
    found = pass_at_1(problems, solutions, workers=2)
    assert (found.problems, found.passed) == (164, 164), found.outcomes
