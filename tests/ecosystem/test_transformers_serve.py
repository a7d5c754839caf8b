"""`transformers serve`, in both environments of `make test-engines`, which have what it needs: FastAPI and uvicorn.

That of vLLM has an earlier release of transformers, whose attention functions write the pages of continuous batching.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from support.engines import convert_tiny

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1200)]

PROMPT, NEW = "The quick brown fox jumps over the lazy dog while", 12
STARTER = """
import transformers
from transformers.cli.transformers import main

transformers.SharedAttentionLlamaForCausalLM = transformers.AutoModelForCausalLM
main()
"""
"""As in docs/engines.md."""


def window(sinks, tokens):
    return {"window": {"sinks": sinks, "tokens": tokens}}


WINDOWS = {2: {group: window(4, 16) for group in range(4)}, 3: {0: window(4, 8)}}
STOCK = {layer: {group: window(0, 16) for group in range(4)} for layer in (2, 4)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


def expected(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


class Refused(Exception):
    """What the server says of a request that it does not answer."""


class Server:
    """`transformers serve`, by its own program or by one that sets names before."""

    def __init__(self, program, *options, environment="SA_CONVERT_ENGINES"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["serve", "--device", "cpu", "--dtype", "float32", "--port", self.port, *options]
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [os.environ[environment], "-c", program, *map(str, options)],
            env={**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self):
        for _ in range(600):
            try:
                self.ask("health")
                return self
            except urllib.error.URLError:
                assert self.process.poll() is None, self.process.stdout.read()
                time.sleep(0.5)
        raise TimeoutError

    def __exit__(self, *_):
        self.process.terminate()  # and not killed: it says why it refused once it has answered
        try:
            self.log = self.process.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.log = self.process.communicate()[0]

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from None

    def complete(self, folder):
        body = {"model": str(folder), "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
        return self.ask("v1/completions", body)["choices"][0]["text"]


PLAIN = "from transformers.cli.transformers import main\nmain()"


def test_a_folder_without_code_is_served(root):
    folder = convert_tiny(root, "qwen3", "stock", STOCK, engine="vllm")
    with Server(PLAIN) as server:
        assert server.complete(folder) == expected(folder)


@pytest.mark.parametrize("environment", ["SA_CONVERT_ENGINES", "SA_CONVERT_EXPORTS"])
def test_a_folder_with_code_is_served_once_its_class_has_a_name_in_transformers(root, environment):
    folder = convert_tiny(root, "llama", "window", WINDOWS)
    with Server(STARTER, "--trust-remote-code", environment=environment) as server:
        assert server.complete(folder) == expected(folder)


CONTINUOUS = ("--continuous-batching", "--cb-num-blocks", 64, "--cb-max-batch-tokens", 256)
"""Without a number of blocks it takes nine tenths of the machine's memory on a CPU, whatever of that is free."""


@pytest.mark.parametrize("name", ["base", "stock"])
def test_continuous_batching_serves_a_base_and_a_folder_without_code(root, name):
    folder = convert_tiny(root, "qwen3", "stock", STOCK, engine="vllm").with_name(f"qwen3-{name}")
    with Server(PLAIN, *CONTINUOUS) as server:
        assert server.complete(folder) == expected(folder)


PLANS = {
    "span": {layer: {group: {"share": [[2, 2 * group], [2, 2 * group + 1]]} for group in range(4)} for layer in (3, 4)},
    "heads": {3: {0: {"share": [[2, 2], None]}, 1: {"share": [[2, 2], [1, 3]]}}},
    "window": WINDOWS,
    "low_rank": {2: {group: {"low_rank": {"keys": 16, "values": 16}} for group in range(4)}},
    "drop": {3: "drop"},
    "linear": {3: "linear"},
}


@pytest.mark.parametrize("environment", ["SA_CONVERT_ENGINES", "SA_CONVERT_EXPORTS"])
def test_continuous_batching_serves_every_treatment(root, environment):
    folders = {name: convert_tiny(root, "llama", name, plan) for name, plan in PLANS.items()}
    with Server(STARTER, "--trust-remote-code", *CONTINUOUS, environment=environment) as server:
        found = {name: server.complete(folder) for name, folder in folders.items()}
    assert found == {name: expected(folder) for name, folder in folders.items()}


FLASH = """
import transformers
from transformers.cli.transformers import main

class Flash:
    @staticmethod
    def from_pretrained(*args, **kwargs):
        model = transformers.AutoModelForCausalLM.from_pretrained(*args, **kwargs)
        model.config._attn_implementation_internal = "flash_attention_2"
        return model

transformers.SharedAttentionLlamaForCausalLM = Flash
main()
"""
"""As if flash attention were installed, and chosen."""


@pytest.mark.parametrize("environment", ["SA_CONVERT_ENGINES", "SA_CONVERT_EXPORTS"])
def test_the_log_says_what_to_do_if_pages_cannot_be_written(root, environment):
    folder = convert_tiny(root, "llama", "span", PLANS["span"])
    server = Server(FLASH, "--trust-remote-code", *CONTINUOUS, environment=environment)
    with server, pytest.raises(Refused):
        server.complete(folder)
    assert "load this model with attn_implementation='sdpa'" in server.log


def test_by_itself_transformers_refuses_a_folder_with_code(root):
    folder = convert_tiny(root, "llama", "window", WINDOWS)
    with Server(PLAIN, "--trust-remote-code") as server, pytest.raises(Refused):
        server.complete(folder)
    assert "module transformers has no attribute SharedAttentionLlamaForCausalLM" in server.log
