"""Does the newest transformers run what we make? The part of `make test` that looks, and tells.

python tests/support/newest.py

Runs the tests that are marked `newest` on the newest release that the registry serves, and writes what came out to
build/newest.txt and to the terminal. A release that came after the pinned one may break us at any time, whatever is
being landed: so it is reported, and the exit status stays 0. While the pinned release is the newest, a failure counts.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "newest.txt"
PYTHON = ROOT / ".venv-newest" / "bin" / "python"


def newest_release() -> str | None:
    """None if the registry does not answer."""
    listed = run(sys.executable, "-m", "pip", "index", "versions", "transformers")
    found = re.search(r"^transformers \(([^)]+)\)", listed.stdout, re.MULTILINE)
    return found.group(1) if found else None


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    """Standard error comes after what is on standard output."""
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def tell(headline: str, details: str = "") -> None:
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(f"{headline}\n\n{details}" if details else f"{headline}\n")
    print(f"{details}\n{headline}" if details else headline)


def main() -> int:
    pinned, newest = version("transformers"), newest_release()
    if newest is None:
        tell("newest transformers: not tried, since the registry does not answer.")
        return 0
    python = sys.executable
    if newest != pinned:
        made = run("make", "newest-environment")
        if made.returncode != 0:
            tell(f"transformers {newest}: not tried, since its environment could not be made.", made.stdout)
            return 0
        python = PYTHON
        asked = "from importlib.metadata import version; print(version('transformers'))"
        found = run(python, "-c", asked).stdout.strip()
        if found != newest:
            tell(f"transformers {newest}: not tried, since pip chooses {found} with our other requirements.")
            return 0
    tests = ("-m", "pytest", "-m", "newest", "-n", 2, "--dist", "loadgroup")
    done = run(sys.executable, *tests, SA_CONVERT_NEWEST=str(python))
    what = f"transformers {newest}, the newest release"
    if done.returncode == 0:
        tell(f"{what}: runs what we make.", done.stdout)
        return 0
    if newest == pinned:
        tell(f"{what} and the pinned one: broken.", done.stdout)
        return done.returncode
    tell(
        f"{what}: BROKEN; {pinned}, which is pinned, is not concerned. See {REPORT.relative_to(ROOT)}, and run "
        "`make test-newest`.",
        done.stdout,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
