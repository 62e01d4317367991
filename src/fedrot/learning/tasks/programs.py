"""Programming problems with tests: HumanEval (Chen et al., arXiv 2107.03374), scored by pass@1.

The model writes on after each prompt, greedily; its program with the problem's tests behind it runs in the sandbox and
counts if it comes to its end. One completion a problem, so pass@1 is the share that passes.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedrot.core.errors import DataError
from fedrot.learning.generation import cut_prompts, warn_of_cut, write_on
from fedrot.learning.models import ResidentModel
from fedrot.learning.sandbox import LIMITS, Limits, Outcome, run_programs

# Where a function's body is over (the paper's list).
STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```")


@dataclass(frozen=True)
class Problem:
    """A function to write."""

    name: str
    prompt: str  # up to the body
    test: str  # defines check(candidate)
    entry: str  # the function's name

    def program(self, completion: str) -> str:
        """What is run for a completion."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry})\n"


def read_problems(path: Path) -> list[Problem]:
    """The problems of HumanEval.jsonl or HumanEval.jsonl.gz, or of a folder that holds one of them.

    Raises `DataError` naming the file and line that cannot be used.
    """
    if path.is_dir():
        path = next((path / n for n in ("HumanEval.jsonl", "HumanEval.jsonl.gz") if (path / n).exists()), path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            problems = [_problem(line, number, path) for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: HumanEval's problems cannot be read ({problem}); see --data.path") from None
    if not problems:
        raise DataError(f"{path}: holds no problems")
    return problems


def _problem(line: str, number: int, path: Path) -> Problem:
    try:
        one = json.loads(line)
        texts = [one[key] for key in ("task_id", "prompt", "test", "entry_point")]
    except (json.JSONDecodeError, KeyError, TypeError) as problem:
        raise DataError(
            f"{path}: line {number} is no problem of HumanEval ({type(problem).__name__}: {problem})"
        ) from None
    if not all(isinstance(text, str) and text for text in texts) or not texts[3].isidentifier():
        raise DataError(f"{path}: line {number} has an empty or malformed field")
    return Problem(*texts)


def completions(
    model: ResidentModel, problems: Sequence[Problem], tokens: int, batch: int, precision: str = "fp32"
) -> list[str]:
    """What the model writes after each prompt, with the adapter that is in it."""
    tokenizer = model.tokenizer
    prompts = [np.asarray(tokenizer(one.prompt)["input_ids"], dtype=np.int32) for one in problems]
    warn_of_cut(sum(cut_prompts(model, prompts, tokens)), len(prompts))
    return write_on(model, prompts, tokens, batch, precision, STOP)


@dataclass(frozen=True)
class Passed:
    """How the programs of some problems ended."""

    problems: int
    passed: int
    low: float  # 95 % interval of the share that passes (Wilson 1927)
    high: float
    outcomes: Mapping[Outcome, int]

    def record(self) -> dict[str, object]:
        """Plain values."""
        share = self.passed / self.problems
        return {
            "split": "humaneval",
            "examples": self.problems,
            "metric": "pass_at_1",
            "pass_at_1": share,
            "low": self.low,
            "high": self.high,
            **{outcome: count for outcome, count in self.outcomes.items() if outcome != "passed"},
        }


def pass_at_1(problems: Sequence[Problem], written: Sequence[str], workers: int = 1, limits: Limits = LIMITS) -> Passed:
    """Run every completion with its problem's tests. Raises `SandboxUnavailable` where programs cannot be contained."""
    from scipy.stats import binomtest

    programs = [one.program(text) for one, text in zip(problems, written, strict=True)]
    outcomes = Counter(ran.outcome for ran in run_programs(programs, limits, workers))
    interval = binomtest(outcomes["passed"], len(programs)).proportion_ci(method="wilson")
    return Passed(len(programs), outcomes["passed"], float(interval.low), float(interval.high), dict(outcomes))
