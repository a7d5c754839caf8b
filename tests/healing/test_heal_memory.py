"""Logits of a whole step are never in memory, in training and in judging, however many tokens the model knows."""

import os
import subprocess
import sys

import pytest

from support.processes import ROOT

VOCABULARY, ROWS, LENGTH = 50_000, 16, 256
LOGITS = 4 * VOCABULARY * ROWS * LENGTH
"""Bytes of the logits of one model in one step: 820 MB. A loss with autograd needs several times as many."""

PROGRAM = f"""
import resource, sys
import torch
from sa_convert.heal.distilled import Distilled, head_of
from support.tiny_models import save_tiny

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

torch.set_num_threads(1)
student = save_tiny("llama", sys.argv[1], vocab_size={VOCABULARY})
tokens = torch.randint(5, 110, ({ROWS}, {LENGTH}))
scored = torch.ones_like(tokens, dtype=torch.bool)
scored[:, 0] = False
model = Distilled(student, head_of(student, student, tokens[:1, :8]), False)
assert model.head is not None
for parameter in student.parameters():
    parameter.requires_grad_(False)
student.model.layers[3].self_attn.o_proj.weight.requires_grad_(True)
wanted = torch.randn({ROWS}, {LENGTH}, student.config.hidden_size)
before = peak()
model.train()(tokens=tokens, scored=scored, wanted=wanted)["loss"].backward()
trained = peak() - before
with torch.no_grad():
    model.eval()(tokens=tokens, scored=scored, wanted=wanted)
print(trained, peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_memory_does_not_grow_with_the_logits_of_a_step(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    trained, judged = map(int, done.stdout.split())
    assert trained < 0.8 * LOGITS  # some chunks of 64 MB and the layers; whole logits would be there several times
    assert judged < 0.8 * LOGITS
