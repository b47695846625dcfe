"""Every kernel of the layers: the compiled CPU operators, Triton, and torch's own."""
