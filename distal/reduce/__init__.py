"""Reduce the assignments of a cycle to one score per sample and measure."""
