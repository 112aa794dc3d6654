"""Batch norm over groups of a batch: a layer and its implementations. Imports distributed and errors."""
