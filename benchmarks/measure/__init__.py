"""How things are measured: taking turns, the configurations of the step, resources, sample data."""
