"""A line of the benchmark's table, the table, and what it was measured on."""

import csv
import fcntl
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Result:
    """A figure; without a goal it is for information."""

    name: str
    figure: float
    unit: str = ""
    goal: float | None = None
    at_least: bool = False  # the goal is a lower bound

    @property
    def holds(self) -> bool:
        """Whether the goal is reached."""
        if self.goal is None:
            return True
        return self.figure >= self.goal if self.at_least else self.figure <= self.goal


class Quiet:
    """A watcher that shows nothing."""

    def prepared(self, *_: object) -> None:
        """Nothing."""

    round_started = client_done = evaluating = round_finished = prepared


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of one call, all threads together."""
    began = time.process_time()
    work()
    return time.process_time() - began


def in_turns(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of every way, one after the other in each repeat, after a turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            spent = cpu(way)
            if turn:
                times[name].append(spent)
    return times


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios of what was measured in the same repeat."""
    return median(a / b for a, b in zip(above, below, strict=True))


def machine() -> dict[str, Any]:
    """What this was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512_BF16": torch.cpu._is_avx512_bf16_supported(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def show(results: list[Result], about: dict[str, Any]) -> None:
    """The table."""
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    width = max(len(r.name) for r in results)
    print(f"{'name':<{width}}  {'figure':>12}  {'goal':>12}  holds")
    for r in results:
        goal = "" if r.goal is None else f"{'>=' if r.at_least else '<='} {r.goal:g} {r.unit}"
        print(f"{r.name:<{width}}  {r.figure:>9.3f} {r.unit:<2}  {goal:>12}  {'' if r.goal is None else r.holds}")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, header first."""
    rule = "|" + "---|" * len(lines[0])
    head, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, rule, *rest]) + "\n"


def read_csv(path: Path) -> list[dict[str, str]]:
    """A file's rows."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_csv(path: Path, columns: Sequence[str], row: Mapping[str, str]) -> None:
    """Append a row, with the header where the file is new; other processes may do so too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
