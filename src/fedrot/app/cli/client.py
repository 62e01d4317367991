"""`fedrot client --server HOST:PORT --key NAME.key --data DIR [--ca FILE] [...]`."""

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrot.app.cli.parser import CommandParser
from fedrot.app.cli.service import log_here, until_terminated
from fedrot.core.errors import FedrotError

DESCRIPTION = """\
Take part in runs between sites: this process is one client, until Ctrl-C. What is trained comes from the server's
recipe; where data and model are and how much of the machine is used is said here. Only updates of the adapter, numbers
of examples and scores leave this site. Flower's SuperNode carries the messages; it and the worker that holds the model
are started, kept running and ended here."""

_PORT = 9092
_SENDING = 15.0  # seconds after the last reply, in which the SuperNode sends it
_LOOK = 1.0


def main(words: Sequence[str]) -> int:
    """Answer the server until Ctrl-C, or with --once until a run is over."""
    parser = CommandParser(prog="fedrot client", description=DESCRIPTION)
    parser.add_argument(
        "--server", required=True, help=f"the server's HOST or HOST:PORT (port {_PORT} if none is said)"
    )
    parser.add_argument("--key", type=Path, required=True, help="this client's NAME.key")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of this site's data, as the recipe's data.path"
    )
    parser.add_argument("--ca", type=Path, help="the authority's ca.crt (default: the one beside the key)")
    parser.add_argument("--model", help="this site's copy of the base model (default: as the recipe says)")
    parser.add_argument("--state", type=Path, help="folder for what the client keeps, and logs (default: sites/NAME)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="where to compute (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: one a core)")
    parser.add_argument("--secure", action="store_true", help="take part in runs with secure.aggregation only")
    parser.add_argument("--recipe", type=Path, help="the recipe that was agreed on: no other is taken part in")
    parser.add_argument("--once", action="store_true", help="end when a run is over")
    call = parser.parse_args(list(words))
    if not call.data.is_dir():
        raise FedrotError(f"{call.data}: no such folder; give that of this site's data by --data")
    if call.threads is not None and call.threads < 1:
        raise FedrotError(f"--threads must be at least 1, got {call.threads}")
    if not call.key.is_file():
        raise FedrotError(f"{call.key}: no such file; fedrot keys client NAME makes a client's key")
    certificate = call.ca or call.key.with_name("ca.crt")
    if not certificate.is_file():
        raise FedrotError(f"{certificate}: no such file; give the authority's certificate of the server by --ca")
    from fedrot.running.flower.tether import environment

    state: Path = call.state or Path("sites") / call.key.stem
    os.environ.update(environment(state / "flower"))  # before Flower is imported
    from fedrot.running.flower.carrier import carry, to_worker
    from fedrot.running.flower.keys import client_key
    from fedrot.running.flower.programs import supernode
    from fedrot.running.network.messages import Message
    from fedrot.running.network.site import Here
    from fedrot.running.network.worker import Worker

    name = client_key(call.key)
    compute: dict[str, Any] = {key: getattr(call, key) for key in ("device", "threads") if getattr(call, key)}
    agreed = None
    if call.recipe is not None:
        from fedrot.running.recipe_file import read_recipe
        from fedrot.running.recipe_library import find

        read_recipe(call.recipe, ())  # what is wrong with it is said now
        agreed = str(find(call.recipe).absolute())
    here = Here(name, call.data.absolute(), call.model, compute, call.secure, agreed)
    server = call.server if ":" in call.server.rpartition("]")[2] else f"{call.server}:{_PORT}"
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.enter_context(until_terminated())
        log_here(state / "client.log")
        log = logging.getLogger("fedrot")
        worker = stack.enter_context(Worker(here, state, state / "worker.sock"))
        address, secret = stack.enter_context(supernode(state / "flower", server, certificate, call.key))
        log.info("%s: ready for runs of %s; data %s, state %s", name, server, call.data, state)
        ask = to_worker(worker.path)

        def handle(request: Message) -> Message:
            reply = ask(request)
            log.info("%s", said(name, request, reply))
            if call.once and request.header.get("kind") == "finish" and reply.refused is None:
                over.set()
            return reply

        ending = threading.Event()
        stack.callback(ending.set)
        threading.Thread(target=carry, args=(address, secret, handle, ending), daemon=True).start()
        while not over.is_set():
            worker.wait(_LOOK)  # raises where it was given up
        worker.wait(_SENDING)
    return 0


def said(name: str, request: Any, reply: Any) -> str:
    """A request and what came of it, in a line of the log."""
    kind, number = str(request.header.get("kind"))[:20], request.header.get("round")
    about = f"{kind} of round {number}" if isinstance(number, int) else kind
    return f"{name}: {about}: {'answered' if reply.refused is None else reply.refused}"
