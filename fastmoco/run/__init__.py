"""One training run from start to last checkpoint, and the files in its folder. Imports step, recipes and below."""
