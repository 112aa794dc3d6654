"""Momentum Contrast (MoCo) pretraining as fast as the hardware allows."""
