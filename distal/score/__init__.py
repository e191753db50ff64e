"""Predict the class of every eligible sample at every checkpoint."""
