"""Commands of the command line, one module each. They may import everything except `fastmoco.cli`."""
