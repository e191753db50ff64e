"""`python -m distal` is the `distal` command."""

from distal.cli.app import main

main()
