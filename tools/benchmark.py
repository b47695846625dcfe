#!/usr/bin/env python3
"""Times normalization layers against BatchNorm; see --help."""

from mabn_d2.commands.benchmark import main

if __name__ == "__main__":
    main()
