#!/usr/bin/env python
"""Draws test error against the normalization batch; see --help."""

from mabn_d2.commands.sweep_batch_size import main

if __name__ == "__main__":
    main()
