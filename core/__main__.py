"""`python -m skerry.core`: the same as the `skerry` command, for where no script is on the path."""

from skerry.core.cli import main

main()
