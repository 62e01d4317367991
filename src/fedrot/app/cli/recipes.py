"""`fedrot recipes`."""

import textwrap
from collections.abc import Sequence

from fedrot.app.cli.parser import CommandParser


def main(words: Sequence[str]) -> int:
    """List the recipes that come with fedrot."""
    parser = CommandParser(
        prog="fedrot recipes",
        description="The recipes that come with fedrot: fedrot run NAME, or fedrot run NAME --small for a reduced run.",
    )
    parser.parse_args(list(words))
    from fedrot.running.recipe_library import FOLDER, recipes

    for name, about in recipes().items():
        print(name)
        print(textwrap.fill(about, 100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
    print(f"files: {FOLDER}")
    return 0
