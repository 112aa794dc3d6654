"""Checks of this machine, each tried in a process of its own. Imports run, step, model, distributed and below."""
