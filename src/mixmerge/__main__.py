"""`python -m mixmerge`: the command line."""

from mixmerge.cli import main

main()
