"""What the benchmark scripts share: timing, variants of the training step, resources, sample data."""
