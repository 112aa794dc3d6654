"""Augmentation: presets, sampled parameters, and their application in torch and Triton. Imports data and below."""
