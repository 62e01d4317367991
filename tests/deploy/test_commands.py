"""The ten commands of docs/deploy.md, as they are written, end in an adapter and a report."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_ten_commands(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL | re.MULTILINE)
    commands = block.splitlines()
    assert len(commands) == 10
    assert commands[0].startswith("pip install")  # what runs here is installed already
    words = "\n".join(["set -e", *commands[1:], "wait"])
    environment = {**os.environ, "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["bash", "-c", words],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said, _ = process.communicate(timeout=900)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 0, said
    assert "adapter  runs/trial/adapter" in said
    assert (tmp_path / "runs" / "trial" / "adapter" / "adapter_model.safetensors").exists()
    assert "Between sites" in (tmp_path / "runs" / "trial" / "report.html").read_text()
    for number in range(3):
        assert list((tmp_path / "sites" / f"client-{number}").glob("*/adapter/adapter_model.safetensors"))
