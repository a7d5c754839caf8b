"""What tests of the command line look at."""

import hashlib
import json
import re
from pathlib import Path

SPAN = {3: [[2, head] for head in range(8)]}


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(result, status, pattern, output=None):
    """One line on stderr (after progress), no traceback, nothing on stdout, nothing at the output."""
    assert result.returncode == status, result.stderr
    last = result.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("Error: "), result.stderr
    assert re.search(pattern, last), last
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if output is not None:
        assert not output.exists()
        assert not [path for path in output.parent.iterdir() if path.name.startswith(f".{output.name}")]


def edit_json(file: Path, **changes) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
