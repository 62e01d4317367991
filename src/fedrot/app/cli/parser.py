"""An argument parser whose complaints are one line."""

import argparse
from typing import Any, NoReturn

from fedrot.core.errors import FedrotError


class CommandParser(argparse.ArgumentParser):
    """argparse, with `FedrotError` instead of a page of usage, and no guessing of shortened options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    @property
    def own(self) -> list[str]:
        """The options of the command itself, beside those that are a recipe's keys."""
        return [word for action in self._actions for word in action.option_strings if word.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every problem."""
        raise FedrotError(f"{message} (see {self.prog} --help)")
