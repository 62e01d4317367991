"""`fedrot COMMAND ...`: find the command, run it, and turn what the user can mend into one line and exit code 2.

A command's module is imported when it is called, so `fedrot --help` needs neither torch nor transformers.
"""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fedrot import __version__
from fedrot.app.cli.advice import advised
from fedrot.core.errors import FedrotError, choices

COMMANDS = {
    "run": "run a recipe: federated fine-tuning to a PEFT adapter, a run folder and a report",
    "eval": "score an adapter on the data of a recipe, whole and by client",
    "compare": "run a recipe with several methods and seeds: a table with intervals, and figures",
    "merge": "several PEFT adapters to one, with the error that it makes",
    "recipes": "list the recipes that come with fedrot",
    "report": "figures and an HTML page from one or more run folders",
    "server": "run a recipe between sites: the server's side",
    "client": "take part in runs between sites: a client's side",
    "keys": "make certificates and keys for runs between sites",
    "status": "how a run stands: rounds, clients, what was dropped; in the terminal or on a page",
    "data": "fetch models and data from the package index; show who gets which examples",
    "methods": "list the aggregation methods with what they need and their settings",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"fedrot {__version__}")
        return 0
    if words[0] not in COMMANDS:
        return complain(f"there is no command {words[0]!r}; choose {choices(COMMANDS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status: int = import_module(f"fedrot.app.cli.{words[0]}").main(words[1:])
    except FedrotError as problem:
        return complain(str(problem))
    except ModuleNotFoundError as problem:
        if (problem.name or "").split(".")[0] in {"fedrot", "torch", "numpy", "safetensors"}:
            raise
        extra = "flower" if (problem.name or "").split(".")[0] in {"flwr", "cryptography", "httpx"} else "run"
        return complain(f"{problem.name} is not installed; run: pip install 'fedrot[{extra}]'")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader, e.g. head, has seen enough
        return 0
    except OSError as problem:
        return complain(disk_problem(problem))
    except KeyboardInterrupt as stopped:
        return complain(f"interrupted{advised(stopped)}", 130)
    return status


def usage() -> str:
    """What `fedrot --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fedrot COMMAND ...",
            "",
            "Federated LoRA fine-tuning with aligned factors: many data owners, one adapter, no shared data.",
            "",
            "commands:",
            *lines,
            "",
            "fedrot COMMAND --help says more; fedrot --version gives the version.",
        ]
    )


def complain(message: str, status: int = 2) -> int:
    """One line on stderr."""
    print(f"fedrot: {' '.join(message.split())}", file=sys.stderr)
    return status


def disk_problem(problem: OSError) -> str:
    """An operating-system error in words, with the way out where it is known."""
    where = f"{problem.filename}: " if problem.filename else ""
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = f"; free some space{advised(problem)}" if full else ""
    return f"{where}{problem.strerror or problem}{advice}"


if __name__ == "__main__":
    sys.exit(main())
