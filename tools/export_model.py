#!/usr/bin/env python
"""Writes a trained detector as TorchScript, ONNX or a program of torch.export; see --help."""

from mabn_d2.commands.export_model import main

if __name__ == "__main__":
    main()
