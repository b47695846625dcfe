#!/usr/bin/env python
"""Trains and evaluates Detectron2 models with MABN; see --help."""

from mabn_d2.commands.train_net import main

if __name__ == "__main__":
    main()
