"""Trains and tests classifiers on an image folder, with normalization batches of any size."""

from collections.abc import Sequence

from ..classification.arguments import parse_args
from ..classification.training import train_classifier
from ..engine import one_line_errors


@one_line_errors(FloatingPointError, OSError, ValueError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Train or test; an error that a user can correct is one line and exit status 1."""
    train_classifier(parse_args(arguments))
