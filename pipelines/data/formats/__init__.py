"""The formats of image files, one file each: encoded bytes → pixels as stored, or a ValueError with the reason."""
