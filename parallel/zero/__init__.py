"""Optimizer state sharded over the data-parallel ranks (ZeRO-1), by two libraries."""
