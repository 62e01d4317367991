"""What the two commands that stay, server and client, have in common: their log, and how they are ended."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def log_here(path: Path) -> None:
    """What fedrot says of its work goes to stderr and, with the time, to a file.

    Its folder is for this user alone from then on: a server's has what clients sent, a client's what it keeps.
    """
    from fedrot.core.files import private_folder  # with torch

    private_folder(path.parent)
    log = logging.getLogger("fedrot")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in (logging.StreamHandler(), logging.FileHandler(path, encoding="utf-8")):
        form = "%(message)s" if type(handler) is logging.StreamHandler else "%(asctime)s %(message)s"
        handler.setFormatter(logging.Formatter(form))
        log.addHandler(handler)
    for quiet in ("flwr", "httpx"):  # fedrot says itself what came of it
        logging.getLogger(quiet).setLevel(logging.ERROR)


@contextmanager
def until_terminated() -> Iterator[None]:
    """A request to end, as a service manager sends it, is taken as Ctrl-C is."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
