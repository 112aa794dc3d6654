"""Grids of runs over settings, and a plot of their results. Imports run and below."""
