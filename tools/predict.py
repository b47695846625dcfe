#!/usr/bin/env python
"""Finds objects in photos with a trained model; see --help."""

from mabn_d2.commands.predict import main

if __name__ == "__main__":
    main()
