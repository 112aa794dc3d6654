"""Bytes on disk in, two augmented views of every image on the training device out."""
