"""The Hub as a process: `python -m support.loopback_hub --root DIR --port-file FILE`, models in DIR/org/name."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
from pathlib import Path

from . import WRITE_TOKEN, LoopbackHub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m support.loopback_hub", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of organisations of model folders")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--port-file", type=Path, help="written when the Hub answers")
    parser.add_argument("--private", action="append", default=[], metavar="ORG/NAME")
    parser.add_argument("--gated", action="append", default=[], metavar="ORG/NAME")
    options = parser.parse_args()
    with LoopbackHub(options.port) as hub:
        hub.users[WRITE_TOKEN]["orgs"] = organisations = sorted({path.parent.name for path in options.root.glob("*/*")})
        for organisation in organisations:
            for folder in sorted((options.root / organisation).iterdir()):
                name = f"{organisation}/{folder.name}"
                hub.add_repo(name, folder, private=name in options.private, gated=name in options.gated)
        if options.port_file:
            unfinished = options.port_file.with_name(f"{options.port_file.name}.tmp")
            unfinished.write_text(hub.url.rsplit(":", 1)[1])
            os.replace(unfinished, options.port_file)
        print(f"HF_ENDPOINT={hub.url} HF_TOKEN={WRITE_TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
