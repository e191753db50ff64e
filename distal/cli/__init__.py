"""The `distal` command."""
