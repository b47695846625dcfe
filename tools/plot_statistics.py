#!/usr/bin/env python
"""Draws the statistics that the norms saw in training; see --help."""

from mabn_d2.commands.plot_statistics import main

if __name__ == "__main__":
    main()
