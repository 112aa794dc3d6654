"""fastmoco from Python: what `from fastmoco import ...` gives. Imports everything else; nothing imports it."""
