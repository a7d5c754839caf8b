# make demo: convert a real model and generate with the result.  make test: lint, types and all tests.
# Both set up what they need, in .venv (and .venv-transformers-4 for the tests); nothing else is touched.

PYTHON ?= python3
VENV := .venv
VENV4 := .venv-transformers-4
RUN := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint docs fuzz clean

demo: $(VENV)/ready
	$(RUN) docs/demo/demo.py demo

test: lint $(VENV4)/ready
	SA_CONVERT_TRANSFORMERS_4=$(CURDIR)/$(VENV4)/bin/python $(RUN) -m pytest -n 2 --dist loadgroup

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Damaged input, kills, full disks, two runs at once: at most ten minutes. FUZZ: options, such as '--page docs/reliability.md'.
fuzz: $(VENV)/ready
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(RUN) -m fuzz $(FUZZ)

docs: $(VENV)/ready
	$(RUN) docs/generate.py

# torch comes first and alone: asked for by another package, pip would fetch its newest build with CUDA.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev,gguf]'
	touch $@

$(VENV4)/ready: tests/requirements-transformers-4.txt
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/pip install -q torch==2.13.0
	$(VENV4)/bin/pip install -q -r $<
	touch $@

clean:
	rm -rf $(VENV) $(VENV4) demo build dist *.egg-info
