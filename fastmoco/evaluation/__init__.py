"""Probes of frozen features, and evaluation while training. Imports export, run and below."""
