"""The benchmark, at reduced size."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_benchmark_runs_at_reduced_size_and_writes_its_table(tmp_path: Path) -> None:
    written = ROOT / "build" / "bench.json"
    kept = written.read_bytes() if written.exists() else None
    try:
        sizes = "--repeats 1 --steps 1 --clients 2 --limit 32 --scale 2,4 --total 4 --width 512 --tokens 200"
        words = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *sizes.split()]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results = json.loads(written.read_text())["results"]
    finally:
        if kept is not None:
            written.write_bytes(kept)
    names = {r["name"] for r in results}
    assert {name[:2] for name in names if name[0].isdigit()} == {"1.", "2.", "3.", "4.", "5."}
    assert "import fedrot" in names
    for result in results:
        assert set(result) == {"name", "figure", "unit", "goal", "at_least", "holds"}
        above, below = result["figure"] >= result["goal"], result["figure"] <= result["goal"]
        assert result["holds"] == (above if result["at_least"] else below)
        assert result["name"] in done.stdout
