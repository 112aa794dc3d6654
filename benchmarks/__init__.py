"""What is fast, by how much and where: scripts that measure, and the results that are kept."""
