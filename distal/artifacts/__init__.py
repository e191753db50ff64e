"""What a run leaves on disk: one module for each artifact, which alone reads and writes it."""
