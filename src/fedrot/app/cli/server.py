"""`fedrot server RECIPE --tls DIR --clients DIR [--out DIR] [--resume] [...]`."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedrot.app.cli.advice import RESUME, advising
from fedrot.app.cli.parser import CommandParser
from fedrot.app.cli.service import log_here, until_terminated
from fedrot.core.errors import FedrotError

DESCRIPTION = """\
Run a recipe between sites: this process is the server, every site runs fedrot client. The server has the base model
and sees no examples; recipes of data.source files name the labels by data.labels. Flower's SuperLink carries the
messages and is started and ended here. Every key of the recipe is an option too, as in fedrot run."""


@dataclass(frozen=True)
class Call:
    """What `fedrot server` was asked to do."""

    recipe: Path
    tls: Path
    clients: Path
    out: Path | None
    resume: bool
    small: bool
    host: str
    port: int
    wait: float
    grace: float
    page: int | None
    flags: list[str]  # recipe keys
    own: list[str]  # the command's own options


def read_call(words: Sequence[str]) -> Call:
    """Split the command's own options from the recipe's keys."""
    parser = CommandParser(prog="fedrot server", description=DESCRIPTION)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a file, or one of fedrot recipes")
    parser.add_argument("--tls", type=Path, required=True, help="folder with ca.crt, server.crt and server.key")
    parser.add_argument("--clients", type=Path, required=True, help="folder with each client's NAME.pub")
    parser.add_argument("--out", type=Path, help="the run folder (default: runs/NAME)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder; begin it where there is none"
    )
    parser.add_argument("--small", action="store_true", help="the reduced run that the recipe describes under small:")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=9092, help="port to listen at (default: 9092)")
    parser.add_argument(
        "--wait", type=float, default=600.0, help="seconds that the first round may wait for sites (default: 600)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=180.0,
        help="seconds that a site may be gone for (default: 180)",
    )
    parser.add_argument("--page", type=int, metavar="PORT", help="serve a page of how the run stands, on this machine")
    own, flags = parser.parse_known_args(list(words))
    return Call(**vars(own), flags=flags, own=parser.own)


@advising(RESUME)
def main(words: Sequence[str]) -> int:
    """Run the recipe with the sites, then write the report."""
    call = read_call(words)
    from fedrot.app.cli.run import conclude
    from fedrot.app.progress import make_watcher
    from fedrot.running.folder import RunFolder
    from fedrot.running.recipe_file import read_recipe
    from fedrot.running.run import run

    recipe = read_recipe(call.recipe, call.flags, call.small, call.own)
    out = call.out or Path("runs") / recipe.name
    resume = call.resume and (out / "recipe.yaml").exists()
    if not call.resume and (out / "recipe.yaml").exists():
        raise FedrotError(f"{out}: a run is there already; go on with --resume, or choose another folder by --out")
    if resume and (out / "result.json").exists():  # killed when all was done: sites need not be there any more
        folder = RunFolder(out)
        folder.reopen(recipe)
        folder.close()
        conclude(folder)
        return 0
    flower = out / "flower"
    from fedrot.running.flower.tether import environment

    os.environ.update(environment(flower))  # before Flower is imported
    from fedrot.running.flower.keys import check_server_keys, client_keys
    from fedrot.running.flower.link import SteadyGrid
    from fedrot.running.flower.post import GridPost
    from fedrot.running.flower.programs import superlink
    from fedrot.running.network.opening import between_sites, check_for_sites

    check_server_keys(call.tls)
    keys = client_keys(call.clients)
    check_for_sites(recipe, sorted(keys))
    with contextlib.ExitStack() as stack:
        stack.enter_context(until_terminated())
        watcher = stack.enter_context(make_watcher())
        log_here(out / "server.log")
        if call.page is not None:
            from fedrot.app.live.page import serve_page

            watcher.prepared(f"page  {stack.enter_context(serve_page(out, port=call.page))}")
        link = stack.enter_context(superlink(flower, call.host, call.port, call.tls, keys))
        watcher.prepared(f"listens at {call.host}:{call.port} for {', '.join(sorted(keys))}")
        grid = stack.enter_context(contextlib.closing(SteadyGrid(link)))
        post = GridPost(grid, {key: name for name, key in keys.items()}, grace=call.grace)
        folder = run(recipe, out, watcher, resume, between_sites(post, sorted(keys), call.wait))
    conclude(folder)
    return 0
