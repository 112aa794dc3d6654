"""How a run computes its step: fast paths compared with plain PyTorch before training, timed, and remembered."""
