"""The command line as a process: its surface, its errors and its speed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from sa_convert import __version__
from sa_convert.commands.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]

RERUN = "(run again with SA_CONVERT_DEBUG=1 for a traceback to report).\n"

# Scripts rely on these. `convert`'s are those of its own tests.
SURFACE = {
    "inspect": ["MODEL", "--json"],
    "analyze": [
        "MODEL", "-o", "--cache", "--at", "--treatments", "--key-cache", "--calibration", "--sequences", "--length",
        "--seed", "--dtype", "--device", "--overwrite", "--trust-remote-code", "--json",
    ],
    "heal": [
        "DIR", "-o", "--against", "--tokens", "--minutes", "--text", "--train", "--length", "--rows", "--rate",
        "--rank", "--seed", "--accumulate", "--gradient-checkpointing", "--resume", "--max-perplexity-increase",
        "--no-validate", "--overwrite", "--dtype", "--device", "--trust-remote-code", "--json",
    ],
    "evaluate": [
        "MODEL", "--against", "--text", "--sequences", "--length", "--long", "--seed", "--dtype", "--device",
        "--trust-remote-code", "--json",
    ],
    "bench": [
        "MODEL", "--against", "--turns", "--message", "--contexts", "--batches", "--new-tokens", "--repeats",
        "--warmup", "--dtype", "--device", "--threads", "--attn", "--cache", "--seed", "--trust-remote-code",
        "-o", "--json",
    ],
    "chat": [
        "MODEL", "--session", "--system", "--max-new-tokens", "--context", "--temperature", "--seed", "--dtype",
        "--device", "--trust-remote-code",
    ],
    "audit": ["DIR|REPO_ID", "--json"],
    "push": ["DIR", "REPO_ID", "--private", "--revision", "--allow-unvalidated", "--json"],
    "recipes": ["[NAME]"],
}  # fmt: skip


def run_program(program: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code as a process, with a command `boom` that raises what the code names `error`."""
    prelude = (
        "import sys, types, click\n"
        "from sa_convert.commands import main\n"
        "from sa_convert.errors import *\n"
        "def boom(error):\n"
        "    module = types.ModuleType('boom')\n"
        "    def body(): raise error\n"
        "    module.command = click.command('boom')(body)\n"
        "    sys.modules['boom'] = module\n"
        "    main.COMMANDS['boom'] = 'boom'\n"
        "    sys.exit(main.run(['boom']))\n"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", prelude + program]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)


def test_surface_is_frozen():
    context = click.Context(cli)
    assert cli.list_commands(context) == [
        "inspect",
        "analyze",
        "convert",
        "heal",
        "evaluate",
        "bench",
        "chat",
        "audit",
        "push",
        "recipes",
    ]
    for name, expected in SURFACE.items():
        command = cli.get_command(context, name)
        names = [p.opts[0] if isinstance(p, click.Option) else p.make_metavar(context) for p in command.params]
        assert names == expected


def test_help_lists_every_command_fast_and_without_heavy_imports():
    heavy = ("torch", "transformers", "pydantic", "huggingface_hub", "numpy", "matplotlib", "tqdm", "yaml")
    begin = time.monotonic()
    result = run_program(
        "status = main.run(['--help'])\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)\nsys.exit(status)"
    )
    assert time.monotonic() - begin < 2
    assert result.returncode == 0
    assert result.stderr == "[]\n"
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout
    assert "MODEL is a folder" in result.stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(cli, name):
    result = cli(name, "--help")
    assert result.returncode == 0
    assert f"Usage: sa-convert {name}" in result.stdout
    assert result.stderr == ""


def test_version(cli):
    assert cli("--version").stdout == f"sa-convert, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "x", "--jsn"], "No such option"),
        (["recipes", "a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_status_2(cli, arguments, message):
    result = cli(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("RecipeError('recipe.yaml, line 3: no')", 1, "Error: recipe.yaml, line 3: no\n"),
        ("CheckpointError('two\\nlines')", 1, "Error: two lines\n"),
        ("GateRefused('too bad')", 3, "Error: too bad\n"),
        ("KeyboardInterrupt()", 1, "\nError: Interrupted; nothing was written.\n"),
        (
            "KeyError('x')",
            1,
            f"Error: Unexpected KeyError: 'x' {RERUN}",
        ),
        (
            "MemoryError()",
            1,
            f"Error: Unexpected MemoryError {RERUN}",
        ),
        (
            "EOFError('Ran out')",
            1,
            f"\nError: Unexpected EOFError: Ran out {RERUN}",
        ),
        ("click.UsageError('pick one')", 2, "Error: pick one\n"),
    ],
)
def test_errors_are_one_line_and_a_status(error, status, message):
    result = run_program(f"boom({error})")
    assert result.returncode == status
    assert result.stderr.endswith(message)
    assert status == 2 or result.stderr == message
    assert result.stdout == ""


def test_debug_shows_the_traceback():
    result = run_program("boom(KeyError('x'))", SA_CONVERT_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "in body" in result.stderr


def test_ctrl_c_from_outside():
    program = (
        "import time\nmodule = types.ModuleType('slow')\n"
        "def body():\n    print('ready', flush=True); time.sleep(60)\n"
        "module.command = click.command('slow')(body)\nsys.modules['slow'] = module\n"
        "main.COMMANDS['slow'] = 'slow'\nsys.exit(main.run(['slow']))\n"
    )
    prelude = "import sys, types, click\nfrom sa_convert.commands import main\n"
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors.strip() == "Error: Interrupted; nothing was written."


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sa_convert", "recipes"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    os.close(write)
    assert result.returncode == 1
    assert result.stderr == ""


def test_recipes_lists_what_is_shipped(cli):
    result = cli("recipes")
    assert result.returncode == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert list(lines) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert lines["shared-balanced"].endswith("A quarter of the key cache by sharing alone, wherever it costs least.")


def test_recipes_prints_one_as_it_is_written(cli):
    result = cli("recipes", "late-span")
    assert (result.returncode, result.stdout) == (0, (ROOT / "recipes" / "late-span.yaml").read_text())


def test_recipes_checks_a_file(cli, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sharing:\n  spams: []\n")
    result = cli("recipes", path)
    assert result.returncode == 1
    assert result.stderr == f"Error: {path}, line 2: unknown key 'spams' under sharing; did you mean 'spans'?\n"
    assert cli("recipes", "nope").returncode == 1


def test_percent_option():
    program = (
        "from sa_convert.commands.options import PERCENT, echo_json\n"
        "@click.command()\n@click.option('--limit', type=PERCENT)\n"
        "def body(limit): echo_json({'limit': limit})\n"
        "module = types.ModuleType('p'); module.command = body; sys.modules['p'] = module\n"
        "main.COMMANDS['p'] = 'p'\nsys.exit(main.run(sys.argv[1:] or ['p', '--limit', LIMIT]))\n"
    )
    good = run_program("LIMIT = '7.5%'\n" + program)
    assert json.loads(good.stdout) == {"limit": 0.075}
    bad = run_program("LIMIT = '0.05'\n" + program)
    assert bad.returncode == 2
    assert "'0.05' is not a percentage from 0% to 100%; write it with a percent sign, such as 5%." in bad.stderr
