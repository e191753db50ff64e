"""`python -m distal` is the `distal` command."""

from distal.cli import main

main()
