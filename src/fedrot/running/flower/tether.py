"""One of Flower's own programs in a process that ends with whoever started it: `python -m ... NAME ARGUMENTS`.

Standard input is a pipe that the keeper holds open (`network.keeper`); its end is the sign to go.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

_LEAVING = 8.0  # seconds that a program may take to say goodbye


def command(name: str, *arguments: str) -> list[str]:
    """The command line that runs Flower's program `name` so."""
    return [sys.executable, "-P", "-m", "fedrot.running.flower.tether", name, *arguments]


def environment(home: Path) -> Mapping[str, str]:
    """Flower's programs without telemetry, questions about updates and installations; their files are in `home`."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _go_with_the_keeper() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LEAVING)
    os._exit(1)


def run(program: Callable[[], object], name: str, words: Sequence[str]) -> None:
    """Run a program under a name with these words of its command line, and end with the keeper."""
    sys.argv = [name, *words]
    threading.Thread(target=_go_with_the_keeper, daemon=True).start()
    program()


def main() -> None:
    """Run the program."""
    name = sys.argv[1]
    (program,) = entry_points(group="console_scripts", name=name)
    run(program.load(), name, sys.argv[2:])


if __name__ == "__main__":
    main()
