"""The network: its description, its weights, and how images become its input."""
