#!/usr/bin/env python
"""Trains one detector under several norms and compares them; see --help."""

from mabn_d2.commands.compare_norms import main

if __name__ == "__main__":
    main()
