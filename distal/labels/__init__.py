"""Get labels: the first set, and the answers for a selection."""
