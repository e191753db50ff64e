"""`python -m distal.config` prints the reference of all keys: docs/config.md."""

from distal.config import markdown

print(markdown(), end="")
