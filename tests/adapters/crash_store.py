"""Run one store operation and die before its n-th disk operation, for every n.

test_store.py runs it as a process of its own: it forks, and only a process without threads may do
that safely. Dying is `os._exit` from an audit hook, so nothing of the store is patched and no
cleanup code runs, as with kill -9. Prints how many roots it left behind: `root/0`, `root/1`, ...
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from loraplex.adapters.manifest import AdapterManifest
from loraplex.adapters.store import AdapterStore

DISK = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
    "fcntl.flock",
}
DIED = 9


def operate(operation: str, store: AdapterStore, source: Path, manifest: AdapterManifest) -> None:
    if operation == "commit":
        with store.staging() as staging:
            for name in manifest.files:
                with staging.writer(name, 1 << 20) as out:
                    out.write((source / name).read_bytes())
            store.commit(staging, manifest)
    else:
        store.remove(manifest.digest)


def main() -> None:
    operation, source, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    manifest = AdapterManifest.from_json((source / "manifest.json").read_bytes())
    for n in range(200):
        here = root / str(n)
        store = AdapterStore(here)
        if operation != "commit":
            operate("commit", store, source, manifest)
        child = os.fork()
        if child == 0:
            left = n

            def hook(event: str, args: tuple[object, ...]) -> None:
                nonlocal left
                if event in DISK:
                    if left == 0:
                        os._exit(DIED)
                    left -= 1

            sys.addaudithook(hook)
            operate(operation, store, source, manifest)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            shutil.rmtree(here)
            print(n)
            return
        if code != DIED:
            sys.exit(f"the operation failed before step {n}: {code}")
    sys.exit("the operation never ends")


main()
