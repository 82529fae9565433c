PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
TORCH := torch==2.13.0

.PHONY: install demo test check gpu report clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv .venv || (echo "python3 -m venv failed: apt-get install python3-venv" && false)

# torch comes first and pinned: the CPU build, where the index offers one.
$(STAMP): $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[peers]'
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[peers,dev]'
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/strop tune zoo:coder --out runs/demo --resume

test: $(DEV_STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu: $(DEV_STAMP)
	$(BIN)/python -m pytest -m gpu
	$(BIN)/strop claims --scale gpu --json > docs/results/claims-gpu.json

report: $(STAMP)
	$(BIN)/python docs/report.py

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
