#!/usr/bin/env python
"""Trains and tests classifiers on an image folder; see --help."""

from mabn_d2.commands.train_imagenet import main

if __name__ == "__main__":
    main()
