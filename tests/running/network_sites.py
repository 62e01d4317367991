"""Sites in this process: each has its own folder of files, and requests and replies go through their bytes."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_runs import Tiny

from fedrot.running.network.engine import Expected, Network, Post
from fedrot.running.network.messages import Message
from fedrot.running.network.site import Here, Site
from fedrot.running.prepare import Prepared, first_adapter, prepare
from fedrot.running.recipe_file import parse_recipe

Fault = Callable[[Message, Message], Message | str | None]  # request and reply -> what arrives; None: nothing does

# What differs in the last bits, since a stack of one client is not one of many.
ONE_BY_ONE = ("--compute.stack", "1", "--compute.workers", "1")


def divide_files(data: Path, out: Path) -> dict[str, Path]:
    """A folder for every value of the column 'group', with its rows of each file in their order."""
    folders: dict[str, Path] = {}
    for path in sorted(data.glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for group in sorted({row["group"] for row in rows}):
            folder = folders.setdefault(group, out / group)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / path.name).open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(row for row in rows if row["group"] == group)
    return folders


class LocalPost:
    """A post to sites in this process, which can spoil, lose and repeat what it carries."""

    def __init__(self, folders: Mapping[str, Path], memory: Path) -> None:
        self.memory, self.folders = memory, dict(folders)
        self.sites = {name: self.site(name) for name in folders}
        self.faults: dict[tuple[str, str], Fault] = {}  # (client, kind) -> what happens to the reply
        self.away: set[str] = set()  # sites that requests do not reach
        self.carried: list[tuple[str, Message, Message]] = []

    def site(self, name: str) -> Site:
        """A site as it is when its process starts."""
        return Site(Here(name, self.folders[name], compute={"workers": 1, "threads": 1}), self.memory / name)

    def restart(self, name: str) -> None:
        """The site's process died and is there again, with what lies on its disk."""
        self.sites[name] = self.site(name)

    def clients(self) -> Sequence[str]:
        return sorted(self.sites)

    def ask(self, requests: Mapping[str, Message], seconds: float | None) -> Iterator[tuple[str, Message | str]]:
        for client in sorted(requests, reverse=True):  # in an order that is not the clients'
            if client in self.away:
                continue
            if client not in self.sites:
                yield client, "is not connected"
                continue
            request = carried(requests[client])
            reply = carried(self.sites[client].handle(request))
            self.carried.append((client, request, reply))
            fault = self.faults.get((client, request.header["kind"]))
            arrives = fault(request, reply) if fault else reply
            if arrives is not None:
                yield client, arrives


def carried(message: Message) -> Message:
    """A message after its way as bytes."""
    return Message.from_parts(message.header_bytes(), message.payload.clone())


def network(ready: Prepared, post: Post) -> Network:
    """The engine of a server that has the base model and no data of the sites'."""
    recipe = ready.recipe
    expected = Expected(first_adapter(recipe, ready.model), ready.model.fingerprint(), ready.dataset.labels)
    return Network(recipe, expected, post)


def deployed(values: Mapping[str, Any], post: Post, *flags: str) -> Tiny:
    """A run whose engine asks the sites of a post; every site has joined."""
    ready = prepare(parse_recipe(values, (*ONE_BY_ONE, *flags)))
    engine = network(ready, post)
    engine.join()
    assert engine.refused == {}
    start = ready.recipe.method.start(ready.model.read())
    return Tiny(ready.recipe, ready, engine, start)  # type: ignore[arg-type]


def values_of(values: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe's values with sections updated."""
    merged = dict(values)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, Mapping) else value
    return merged
