"""The same run for every combination of some settings, and a plot of the results. Imports run and below."""
