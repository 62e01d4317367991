"""Aggregation methods: one file a family, one class a method. Importing this package registers them all."""

from fedrot.core.methods import factorwise, rotation  # noqa: F401  (imported to register)
from fedrot.core.methods.base import Method, get_method, methods, register

__all__ = ["Method", "get_method", "methods", "register"]
