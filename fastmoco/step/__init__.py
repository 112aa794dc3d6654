"""One training step: loss, gradients, update, CUDA graph. Imports model and below."""
