"""The commands of the command line, one file each. They may import everything but `fastmoco.cli`."""
