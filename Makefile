PYTHON ?= python3
STAMP := .venv/installed

ifeq ($(shell command -v nvidia-smi),)
REQUIREMENTS := -r requirements-test.txt -c constraints-cpu.txt
else
REQUIREMENTS := -r requirements-gpu.txt -r requirements-test.txt
endif

.PHONY: install test demo clean

install: $(STAMP)

# The last line fetches llama.cpp's converter, so that tests and exports find it in the cache.
$(STAMP): $(wildcard requirements*.txt) constraints-cpu.txt pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(REQUIREMENTS) -e .
	.venv/bin/python -c "from tract_lite.converter import llama_cpp_source; llama_cpp_source()"
	touch $(STAMP)

test: install
	.venv/bin/python -m pytest -q

demo: install
	.venv/bin/python recipes/two_stage.py --preset demo

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
