"""Which images a step sees, where they are cropped, in which order. Imports augment, data and below."""
