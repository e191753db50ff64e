"""Train a network on the labelled samples and publish its checkpoints."""
