"""Backbones from files and into files of other libraries. Imports run and below."""
