"""The types of settings: whether a value is of its type, and the type in words."""

from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fedrot.core.errors import FedrotError, choices


def check_type(key: str, value: Any, kind: Any) -> None:
    """Raise `FedrotError` naming the key unless the value is of the type. A whole number is a number, true is none."""
    if not _fits(value, kind):
        raise FedrotError(f"{key} must be {describe(kind)}, got {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def describe(kind: Any) -> str:
    """A type in words: 'a whole number or null'."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
    if kind in words:
        return words[kind]
    if get_origin(kind) is Literal:
        return choices(get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(part) for part in get_args(kind))
    if get_origin(kind) is dict:
        return f"keys and values (each {describe(get_args(kind)[1])})"
    if get_origin(kind) is list:
        return f"a list (each {describe(get_args(kind)[0])})"
    return str(kind)
