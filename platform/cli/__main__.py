"""`python -m loraplex.platform.cli`: the command, where no script is on the path."""

from __future__ import annotations

from loraplex.platform.cli.app import main

main()
