# The whole interface of the repository. `make demo` and `make test` need only Python 3.11+ and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
MODEL  ?=
ARGS   ?=
OUT    ?=
LAYERS := platform engine adapters kernels migrations

.PHONY: init demo serve test lint types imports unit fmt bench gpu clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Loraplex needs Python 3.11 or newer; try `make PYTHON=python3.12 ...`")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Beside its old pins of certifi and huggingface_hub, which only matter to it: a client for tests.
	$(BIN)/python -m pip install --quiet --no-deps lorax-client==0.6.3
	@mkdir -p .ns/loraplex && for d in $(LAYERS); do ln -sfn ../../$$d .ns/loraplex/$$d; done
	@touch $@

init: $(STAMP)                    ## create the environment

demo: $(STAMP)                    ## start the server on the demo model, run the tour, keep serving
	$(BIN)/loraplex demo $(ARGS)

serve: $(STAMP)                   ## make serve MODEL=dir-or-hub-id
	@test -n "$(MODEL)" || { echo 'usage: make serve MODEL=<directory or hub id> [ARGS="--port 8000 ..."]'; exit 2; }
	$(BIN)/loraplex serve --model $(MODEL) $(ARGS)

test: lint types imports unit     ## everything CI runs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	MYPYPATH=.ns $(BIN)/mypy -p loraplex

imports: $(STAMP)
	PYTHONPATH=.ns $(BIN)/lint-imports

unit: $(STAMP)                    ## two workers: one waits for servers and disks half of its time
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

bench: $(STAMP)                   ## the README's tables
	$(BIN)/loraplex bench table $(ARGS)

gpu:                              ## on a GPU: correctness, then all GPU benches; make gpu OUT=folder
	@test -n "$(OUT)" || { echo 'usage: make gpu OUT=<folder> [ARGS="--peer vllm=<unpacked wheel> ..."]'; exit 2; }
	@mkdir -p .ns/loraplex && for d in $(LAYERS); do ln -sfn ../../$$d .ns/loraplex/$$d; done
	PYTHONPATH=.ns$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m loraplex.engine.bench --all --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) .ns build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
