"""ImageNet classification with small normalization batches."""
