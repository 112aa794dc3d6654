"""A run from its start to its last checkpoint, and everything in its folder. Imports step, recipes and below."""
