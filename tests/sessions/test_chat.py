"""`sa-convert chat` as people run it: in a terminal, through a pipe, with a session and without."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from support.cli_cases import refused
from support.processes import ROOT
from support.tiny_models import save_tiny, save_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}<mask>{{ m['content'] }}</s><pad>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant<mask>{% endif %}"
)
GREEDY = ("--temperature", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """It never ends an answer by itself: its output layer is least sure of the token for that."""
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    made = save_tiny("llama", folder)
    with torch.no_grad():
        made.get_output_embeddings().weight[2] = 0
    made.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_one_prompt_from_a_pipe_and_the_next_day(cli, model, tmp_path):
    """Two processes say what one does."""
    file, options = tmp_path / "talk", (*GREEDY, "--max-new-tokens", 12)
    first = cli("chat", model, "--session", file, *options, input="The quick brown\nfox\n")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.endswith("\n")
    size = file.stat().st_size
    second = cli("chat", model, "--session", file, *options, input="jumps over")
    assert second.returncode == 0
    assert re.fullmatch(r"Goes on after 1 turn: \d+ tokens are in the cache\.\n", second.stderr)
    assert file.stat().st_size > size
    alone = cli("chat", model, *options, input="jumps over")
    assert alone.stdout != second.stdout
    assert os.listdir(tmp_path) == ["talk"]


class Terminal:
    """The command with a person before it, who reads what is on the screen."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
        command = [sys.executable, "-m", "sa_convert", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self.screen = ""

    def until(self, text, seconds=240):
        """What comes on the screen until this does."""
        end, seen = time.monotonic() + seconds, ""
        while text not in seen or not seen:
            assert time.monotonic() < end, (text, self.screen)
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    seen += os.read(self.master, 1000).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
        self.screen += seen
        return seen

    def types(self, text):
        os.write(self.master, f"{text}\n".encode())

    def close(self):
        self.until("nothing ever says this", 60) if self.process.poll() is None else None
        os.close(self.master)
        return self.process.wait(60)


def test_a_conversation_in_a_terminal(model, tmp_path):
    file = tmp_path / "talk"
    terminal = Terminal(model, "--session", file, *GREEDY, "--max-new-tokens", 400)
    terminal.until("> ")
    terminal.types("The quick brown")
    answer = terminal.until("brown\r\n")
    while len(answer.split("brown\r\n")[1]) < 3:  # the answer has begun, and is far from its end
        answer += terminal.until("")
    terminal.process.send_signal(signal.SIGINT)
    answer += terminal.until("\r\n> ")
    assert "Traceback" not in terminal.screen
    assert terminal.process.poll() is None
    assert len(answer) > 20
    terminal.types("")  # nothing was said
    terminal.until("> ")
    terminal.types("/exit")
    assert terminal.close() == 0
    again = Terminal(model, "--session", file, *GREEDY, "--max-new-tokens", 4)
    assert "Goes on after 1 turn" in again.until("> ")
    again.types("fox jumps")
    again.until("\r\n> ")
    os.write(again.master, b"\x04")
    assert again.close() == 0


def test_refusals(cli, model, tmp_path):
    file, notes = tmp_path / "talk", tmp_path / "notes.txt"
    notes.write_text("mine")
    refused(cli("chat", model, "--session", notes, input="Hi"), 1, "is there already and no whole session")
    assert notes.read_text() == "mine"
    refused(cli("chat", model, "--context", 4096, input="Hi"), 1, "--context 4096 is more than the 512 positions")
    refused(cli("chat", tmp_path / "nowhere", input="Hi"), 1, "nowhere")
    refused(cli("chat", model, "--context", 40, input="The quick brown fox " * 20), 1, "no room in a context of 40")
    done = cli("chat", model, "--session", file, "--system", "Be kind", "--max-new-tokens", 2, input="Hi")
    assert done.returncode == 0
    again = cli("chat", model, "--session", file, "--system", "Be rude", "--max-new-tokens", 2, input="Hi")
    refused(again, 1, "began with another --system")
    half = cli("chat", model, "--session", file, "--dtype", "bfloat16", "--max-new-tokens", 2, input="Hi")
    refused(half, 1, "filled by a model in float32, and this one computes in bfloat16")
    file.write_bytes(file.read_bytes()[:-10])
    refused(cli("chat", model, "--session", file, input="Hi"), 1, "no whole session")


def test_models_that_do_not_continue_text(cli, tmp_path):
    save_tiny("t5", tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    refused(cli("chat", tmp_path / "t5", input="Hi"), 1, "does not continue a text")
