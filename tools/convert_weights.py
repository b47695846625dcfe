#!/usr/bin/env python
"""Converts checkpoints between formats; see --help."""

from mabn_d2.commands.convert_weights import main

if __name__ == "__main__":
    main()
