"""`fedrot status [RUN] [--follow | --serve [--host H] [--port P] [--token-file F]]`."""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fedrot.app.cli.parser import CommandParser
from fedrot.core.errors import FedrotError

DESCRIPTION = """\
How a run stands, from its folder: rounds, the last scores, when each client was last heard, what was dropped and why.
--serve shows the same on a page that keeps itself up to date. It is for this machine alone unless --host says
otherwise, and then it wants a token."""

_EVERY = 2.0  # seconds from one look to the next


def main(words: Sequence[str]) -> int:
    """Print how a run stands, once or for as long as it lasts, or serve it as a page until Ctrl-C."""
    parser = CommandParser(prog="fedrot status", description=DESCRIPTION)
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="run folder (default: the one below runs/ that changed last)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--follow", action="store_true", help="look again every two seconds until the run has finished")
    how.add_argument("--serve", action="store_true", help="serve a page until Ctrl-C")
    parser.add_argument("--host", help="with --serve: the address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="with --serve: the port (default: any that is free)")
    parser.add_argument("--token-file", type=Path, help="with --serve: a file with the token that readers must give")
    call = parser.parse_args(list(words))
    for name in ("host", "port", "token_file"):
        if getattr(call, name) is not None and not call.serve:
            raise FedrotError(f"--{name.replace('_', '-')} goes with --serve")
    run = call.run or last_run(Path("runs"))
    from fedrot.app.live.summary import read_summary
    from fedrot.app.live.text import told

    summary = read_summary(run)
    try:
        if call.serve:
            return serve(run, call.host or "127.0.0.1", call.port or 0, call.token_file)
        if call.follow:
            return follow(run)
    except KeyboardInterrupt:
        return 0  # how both are ended
    print(told(summary, time.time()))
    return 0


def last_run(runs: Path) -> Path:
    """The run folder below `runs`, at any depth, that changed last. `FedrotError` where there is none."""
    found: list[Path] = []
    for above, names, _ in os.walk(runs):
        for path in [Path(above, name) for name in names]:
            if (path / "recipe.yaml").exists() or (path / "sites.json").exists():
                found.append(path)
                names.remove(path.name)  # no run lies in another
    if not found:
        raise FedrotError(f"give a run folder: fedrot status RUN (there is none below {runs}/)")
    return max(found, key=lambda path: max(file.stat().st_mtime for file in path.iterdir()))


def serve(run: Path, host: str, port: int, token_file: Path | None) -> int:
    """Serve the page of a run until Ctrl-C."""
    from fedrot.app.live.page import read_token, serve_page

    token = None if token_file is None else read_token(token_file)
    with serve_page(run, host, port, token) as url:
        hint = "" if token is None else "?token=..., "
        print(f"{url}  ({hint}Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    return 0


def follow(run: Path) -> int:
    """Show how a run stands until it has finished."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from fedrot.app.live.summary import read_summary
    from fedrot.app.live.text import told

    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            summary = read_summary(run)
            live.update(Text(told(summary, time.time()), no_wrap=True, overflow="ellipsis"), refresh=True)
            if summary.finished:
                return 0
            time.sleep(_EVERY)
