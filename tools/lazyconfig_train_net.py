#!/usr/bin/env python
"""Trains and evaluates a model of a LazyConfig, with MABN; see --help."""

from mabn_d2.commands.lazyconfig_train_net import main

if __name__ == "__main__":
    main()
