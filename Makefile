# Two commands: `make demo` runs the main job, `make test` the tests. Both set up .venv first; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= fedpeek-out/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test slow nightly lint types imports check benchmark clean

demo: $(VENV)/ready
	$(BIN)/fedpeek run $(ARGS) --out $(OUT)

test: $(VENV)/ready
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2

slow: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slow -m slow -n 2 --dist loadfile

nightly: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nightly -m nightly -n 2

lint: $(VENV)/ready
	$(BIN)/ruff check .

types: $(VENV)/ready
	$(BIN)/mypy

imports: $(VENV)/ready
	$(BIN)/lint-imports

check: lint types imports test

benchmark: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.benchmarks.secure_aggregation
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.benchmarks.tap

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) fedpeek-out
