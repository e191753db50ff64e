"""`python -m distal.config` prints the reference of all keys: docs/config.md."""

from distal.config.reference import markdown

print(markdown(), end="")
