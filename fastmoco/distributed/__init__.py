"""Distributed training: launch, collectives, failures of ranks. Imports device and errors."""
