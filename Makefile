# Every target sets up .venv first when it is not there, and `test` .venv-others, where the libraries whose files are checked have
# the older transformers that they need. Python 3.11 or newer is needed, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OTHERS := .venv-others/.ready
STUDY := studies/quick.toml
OUT := studies/out/quick
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help study test lint bench lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s%s\n", $$1, $$2 }' Makefile

study: $(READY) ## compare delta methods on the built-in backbone and write the report
	$(BIN)/deltatune study run $(STUDY) --out $(OUT)
	$(BIN)/deltatune study report $(OUT)

test: $(READY) $(OTHERS) ## run the tests; ARGS="-k lora" narrows them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(READY) ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: $(READY) ## time everything against other libraries and the frozen backbone; ARGS="--device cuda" on a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(ARGS)

RESOLVE := $(BIN)/uv pip compile --constraints requirements-torch.txt --no-emit-package torch --universal --python-version 3.11 \
	--generate-hashes --no-header --quiet

lock: $(READY) ## resolve both locks anew; ARGS="--upgrade" takes newer versions
	$(RESOLVE) pyproject.toml --extra dev --output-file requirements.lock $(ARGS)
	$(RESOLVE) requirements-others.in --output-file requirements-others.lock $(ARGS)

clean: ## remove both environments and caches; the results in studies/out stay
	rm -rf .venv .venv-others build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A lock pins everything but torch, whose build (CPU, CUDA) is the machine's own choice: pip takes the one it is set up for.
# $(call environment,FOLDER,LOCK)
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "deltatune needs Python 3.11 or newer: make PYTHON=python3.11")'
@echo "Setting up $(1) (once, a few minutes)"
@$(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps -r $(2)
@$(1)/bin/python -m pip --disable-pip-version-check install --quiet --no-warn-conflicts -r requirements-torch.txt
endef

$(READY): requirements.lock requirements-torch.txt pyproject.toml
	$(call environment,.venv,requirements.lock)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(OTHERS): requirements-others.lock requirements-torch.txt
	$(call environment,.venv-others,requirements-others.lock)
	@touch $@
