"""The encoders, and the sources of keys and negatives. Imports distributed, config and below."""
