"""Moving Average Batch Normalization (ICLR 2020) for Detectron2."""

__version__ = "0.1.0"
