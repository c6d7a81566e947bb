"""HTTP routes: each parses, calls one service function, shapes the answer."""
