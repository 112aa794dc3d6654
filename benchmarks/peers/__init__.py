"""The trainers that fastmoco is compared with, and their data loaders."""
