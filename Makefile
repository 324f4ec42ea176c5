PYTHON ?= python3
STAMP := .venv/installed
# A worker for each core, and each on its own core.
PYTEST := .venv/bin/python -m pytest -q -n logical

ifeq ($(shell command -v nvidia-smi),)
REQUIREMENTS := -r requirements-test.txt -c constraints-cpu.txt
else
REQUIREMENTS := -r requirements-gpu.txt -r requirements-test.txt
endif

.PHONY: install check test test-all test-unsloth demo clean

install: $(STAMP)

# The last line fetches llama.cpp's converter, so that tests and exports find it in the cache.
$(STAMP): $(wildcard requirements*.txt) constraints-cpu.txt pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(REQUIREMENTS) -e .
	.venv/bin/python -c "from tract_lite.export.converter import llama_cpp_source; llama_cpp_source()"
	touch $(STAMP)

# An answer in a minute: style, types, and all tests that neither train nor export.
check: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PYTEST) -m "not training and not export and not long"

test: install
	$(PYTEST) -m "not long"

# What `make test` leaves out: builds, real servers, other environments. No skip passes.
test-all: install
	REQUIRE_ALL=1 $(PYTEST) -m long -rs

# Of those, Unsloth's path on the processor, in an environment that the test makes.
test-unsloth: install
	REQUIRE_ALL=1 $(PYTEST) tests/test_unsloth.py

demo: install
	.venv/bin/python recipes/two_stage.py --preset demo

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
