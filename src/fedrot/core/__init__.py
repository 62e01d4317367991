"""Tensors only: adapters, alignment, aggregation methods, diagnostics. No model, no network."""
