"""The conductor: the order of the stages, and what one driver process holds."""
