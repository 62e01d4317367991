"""Aggregation methods: one file a family, one class a method. Importing this package registers them all."""

from fedrot.core.methods import (  # noqa: F401  (imported to register)
    alone,
    base_change,
    consensus,
    controls,
    exact,
    factorwise,
    refine,
    rotation,
    sketched,
    svd,
)
from fedrot.core.methods.base import Method, get_method, methods, register

__all__ = ["Method", "get_method", "methods", "register"]
