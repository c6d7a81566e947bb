"""The `loraplex` command. The library does the work; these modules parse, ask and print.

Nothing heavy is imported before it is needed: `loraplex --help` answers at once.
"""

from __future__ import annotations

from loraplex.platform.cli.app import app, main

__all__ = ["app", "main"]
