"""`python -m privfl.cli` is the `privfl` command."""

from privfl.cli import main

main()
