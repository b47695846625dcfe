"""Changes of models that are already built."""
