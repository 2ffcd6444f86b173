# make help lists the commands; what they set up is decided in tools/setup_env.py.
PYTHON ?= python3
VENV ?= .venv
# Another --index-url for torch alone, e.g. https://download.pytorch.org/whl/cpu; OFFLINE=1 asks no index at all.
TORCH_INDEX ?=
OFFLINE ?= 0
# Passed on to the benchmarks, or to pytest.
ARGS ?=
OUT ?=
DRY_RUN ?= 0
export TORCH_INDEX OFFLINE

PY = $(VENV)/bin/python
# A Python that was not named doesn't replace the one that an existing environment was made with.
SETUP = $(PYTHON) tools/setup_env.py --venv $(VENV) $(if $(filter file,$(origin PYTHON)),--keep)
PYTHON_FOLDERS = python/fusednn tools $(wildcard benchmarks examples)
CLANG_FORMAT = $(PY) -c 'import clang_format; clang_format.clang_format()'
CXX_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help build bench bench-full test test-all lint format gpu-check clean distclean

help:
	@echo 'make bench      measure this machine in five minutes: fused layers against PyTorch, as a table and JSON'
	@echo 'make bench-full measure every case'
	@echo 'make test       run the tests; no GPU is needed'
	@echo 'make test-all   the same in every combination, for every GPU target, under every sanitizer'
	@echo 'make build      set up $(VENV) and compile what has changed'
	@echo 'make lint       ruff, mypy and clang-format; make format lets them rewrite'
	@echo 'make gpu-check  with a GPU, offline: build, test and measure there (OUT=folder, DRY_RUN=1)'
	@echo 'make clean      remove what was built; make distclean removes $(VENV) too'
	@echo
	@echo 'PYTHON=python3.12  another Python; its torch is used as it is if it serves'
	@echo 'ARGS="..."         for the benchmarks (make bench ARGS="--no-compile") or pytest (make test ARGS="-k lstm")'
	@echo 'OFFLINE=1          ask no package index; TORCH_INDEX=URL  take torch from there'

build:
	@$(SETUP) --build build

bench:
	@$(SETUP) --build bench
	@$(PY) -m fusednn bench --quick $(ARGS)

bench-full:
	@$(SETUP) --build bench
	@$(PY) -m fusednn bench $(ARGS)

test test-all:
	@FUSEDNN_TEST_MODULES=$${FUSEDNN_TEST_MODULES:-1} $(SETUP) --build test
	@FUSEDNN_REQUIRE_ALL=$${FUSEDNN_REQUIRE_ALL:-1} $(PY) tools/run_tests.py $(if $(filter test-all,$@),--all) $(ARGS)

lint:
	@$(SETUP) lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(PYTHON_FOLDERS)
	@echo 'clang-format --dry-run -Werror csrc'
	@$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES)

format:
	@$(SETUP) lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@$(CLANG_FORMAT) -i $(CXX_SOURCES)

gpu-check:
	@$(PYTHON) tools/gpu_check.py --venv $(VENV) $(if $(OUT),--out '$(OUT)') \
	  $(if $(filter-out 0,$(DRY_RUN)),--dry-run)

clean:
	rm -rf build dist python/fusednn.egg-info fusednn.egg-info python/fusednn/_C*.so python/fusednn/_build_info.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
