"""1×1 convolutions of bottleneck blocks as matrix products, with the batch norms around them in the same kernels."""
