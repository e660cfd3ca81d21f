# make demo   install what it needs, train on digits, export at 6 steps, bench, write the report: minutes on 2 CPU cores
# make test   install what tests need, run the test suite
# make test-fast   the tests without the slow ones
# make web-runtime   fetch onnxruntime-web, once, which the tests of the page in the browser need
# make test-lowest   the core tests with the lowest versions that pyproject.toml promises, in an environment of their own
# make lint   ruff, mypy and the import contracts of pyproject.toml
# make pictures   screenshots and drawings of README and docs made anew, with Chromium; DATA names the folder of CIFAR-10
# make docs   the documentation's site in build/site, without a warning
# make figures   compare every figure in README.md and docs/ with its record
# make messages   write docs/messages.md anew from the source
# make torture   damaged files, kills, full disks, hostile surroundings, crowds: half an hour, writes a record
# A virtual environment is made in .venv unless one is active (or VENV names another).

PYTHON ?= python3
VENV ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.vitrm-installed
DEMO_STAMP := $(VENV)/.vitrm-installed-cpu
DEMO ?= runs/demo

LOWEST_PYTHON ?= python3.10
LOWEST := .venv-lowest

.PHONY: install demo test test-fast test-pages web-runtime test-lowest lint tree docs figures messages pictures torture clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,tensorrt-rtx,dev]'
	@touch $@

# What the demo needs; with everything installed nothing is left to do.
$(DEMO_STAMP): pyproject.toml | $(BIN)/python
	test $(STAMP) -nt pyproject.toml || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu]'
	@touch $@

demo: $(DEMO_STAMP)
	$(BIN)/vitrm-train --data digits --model nano --out $(DEMO) $(if $(wildcard $(DEMO)/config.json),--resume)
	$(BIN)/vitrm-export $(DEMO) --steps 6 -o $(DEMO)/nano-6.onnx
	$(BIN)/vitrm-bench $(DEMO)/nano-6.onnx --batch 1,32 --report $(DEMO)/report.html --json $(DEMO)/bench.json
	@echo "report: $(DEMO)/report.html"

# A process for each core and one more, as many tests wait for commands that they started; each with one thread.  Tests of one
# file stay together, as they share what they export.
PROCESSES ?= $(shell $(PYTHON) -c 'import os; print(min(4, 1 + os.cpu_count()))')
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=20 -n $(PROCESSES) --dist loadfile

test: install
	$(PYTEST) -m "not pages"

test-fast: install
	$(PYTEST) -m "not slow and not pages"

test-pages: install
	$(PYTEST) --dist load -m pages

web-runtime: install
	$(BIN)/python -c "from vitrm.export.web.runtime_files import find_runtime; print(find_runtime(None, download=True))"

# Not among them: what needs OpenVINO, TensorRT, Triton's client or optimum, which are extras with bounds of their own.
test-lowest:
	test -x $(LOWEST)/bin/python || $(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[cpu]' -r tests/lowest-versions.txt
	$(LOWEST)/bin/python -m pytest -q tests/vitrm tests/calib tests/export tests/runtime

pictures: install
	$(BIN)/python benchmarks/pictures.py $(if $(DATA),--data-dir $(DATA))

torture: install
	PYTHONPATH=benchmarks $(BIN)/python -m torture $(TORTURE)

tree:
	@rm -rf build/tree && mkdir -p build/tree
	@cp -rs $(CURDIR)/vitrm build/tree/vitrm
	@for room in export runtime calib; do cp -rs $(CURDIR)/$$room build/tree/vitrm/$$room; done

docs: tree | $(BIN)/python
	test -x $(BIN)/zensical || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/zensical build --strict --clean

figures: | $(BIN)/python
	$(BIN)/python docs/scripts/figures.py

messages: | $(BIN)/python
	$(BIN)/python docs/scripts/messages.py

lint: install tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd build/tree && $(abspath $(BIN))/lint-imports --no-cache $(CURDIR)/pyproject.toml

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
