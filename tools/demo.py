#!/usr/bin/env python
"""Trains Mask R-CNN with MABN on the digit scenes, evaluates it and draws what it learned."""

from mabn_d2.commands.demo import main

if __name__ == "__main__":
    main()
