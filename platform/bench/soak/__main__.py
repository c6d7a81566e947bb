"""`python -m loraplex.platform.bench.soak --requests N --seed S`: exit status 1 if anything was
wrong. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from loraplex.platform.bench.peer import PeerError
from loraplex.platform.bench.report import json_line
from loraplex.platform.bench.soak.plan import Plan
from loraplex.platform.bench.soak.run import soak


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loraplex.platform.bench.soak",
        description="Send requests, uploads, deletions, alias moves, evictions and cancellations "
        "at random to a server of its own, check every answer against transformers + peft, and "
        "that nothing is left over afterwards.",
    )
    parser.add_argument("--requests", type=int, default=2000, help="generations to send")
    parser.add_argument("--seed", type=int, default=0, help="of adapters, prompts and choices")
    parser.add_argument("--concurrency", type=int, default=32, help="things done at once")
    parser.add_argument("--adapters", type=int, default=48, help="different contents")
    parser.add_argument("--folder", type=Path, help="keep all here; default: a temporary one")
    args = parser.parse_args()
    plan = Plan(args.requests, args.seed, args.concurrency, args.adapters)

    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:7.1f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="loraplex-soak-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = soak(plan, folder, say)
        except PeerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for violation in result["violations"]:
        say(f"WRONG: {violation}")
    print(json_line("soak", **result))
    return 1 if result["num_violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
