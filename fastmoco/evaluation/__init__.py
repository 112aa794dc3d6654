"""Probes of a pretrained backbone, and evaluation during training. Imports export, run and below."""
