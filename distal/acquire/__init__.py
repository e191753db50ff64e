"""Choose the samples of a cycle from their scores."""
