"""Several processes that train together: launch, collectives, failures of a rank. Imports device and errors."""
