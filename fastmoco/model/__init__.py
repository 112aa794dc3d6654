"""The encoders, and where keys and negatives come from. Imports distributed, config and below."""
