"""Trains one detector under several norms and compares them."""

from .compare import compare

__all__ = ["compare"]
