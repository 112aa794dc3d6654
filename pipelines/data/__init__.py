"""What is on disk: indexing, decoding and checking images. Imports the modules of `pipelines` itself alone."""
