PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
TORCH := torch==2.13.0
UV := $(BIN)/python -m uv pip install --quiet --python $(BIN)/python

.PHONY: install demo test soak check gpu report docs clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv .venv || (echo "python3 -m venv failed: apt-get install python3-venv" && false)

# torch comes first and pinned: the CPU build, where the index offers one.
$(STAMP): $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) uv
	$(UV) -e '.[peers,serve,audit]'
	touch $@

$(DEV_STAMP): $(STAMP)
	$(UV) -e '.[peers,dev]'
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/strop tune zoo:coder --out runs/demo --resume

# Clusters come last and alone: Ray gives up on a node that is not there within 30 s.
test: $(DEV_STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 3 --dist worksteal --ignore tests/test_executor.py
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/test_executor.py

# Faults and fuzz at length, under an hour. STROP_SEED=N draws others.
soak: $(DEV_STAMP)
	STROP_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20 tests/robustness
	STROP_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20 -m soak tests

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# On a machine with its own Python environment: make gpu PY=python3
PY ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/python,$(PY)),$(DEV_STAMP))
	$(PY) -m pytest -m gpu tests/test_gpu.py tests/test_kernels_triton.py tests/test_kernels_paged.py
	PYTHONPATH=. $(PY) docs/measure_gpu.py

report: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/strop tune zoo:coder --out runs/demo --resume --json > docs/results/demo.json
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python docs/measure_kv.py --out docs/results/kv.json
	OMP_NUM_THREADS=1 $(BIN)/python docs/measure_kv_speed.py --out docs/results/kv-speed.json
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python docs/measure_claims.py --out docs/results/claims.json
	$(BIN)/python docs/report.py
	if command -v chromium > /dev/null; then chromium --headless --no-sandbox --disable-gpu --hide-scrollbars \
		--window-size=1200,1680 --screenshot=docs/report.png file://$(CURDIR)/runs/demo/report.html 2> /dev/null; fi

# The site, into build/site; it opens from disk.
docs: $(DEV_STAMP)
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find strop tests docs -name __pycache__ -exec rm -rf {} +
