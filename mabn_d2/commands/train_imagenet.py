"""Trains and tests classifiers on an image folder, with normalization batches of any size."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..classification.arguments import parse_args
from ..classification.training import train_classifier


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or test; an error that a user can correct is one line and exit status 1."""
    try:
        train_classifier(parse_args(arguments))
    except (FloatingPointError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
