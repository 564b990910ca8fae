PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup train test slow exhaustive rule lint format docs clean

setup: $(STAMP)

# .venv/src holds the repository under the name it is imported by, for tools that read files instead of importing
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('foveal needs Python 3.11 or newer, and this is ' + sys.version.split()[0] + ': try make PYTHON=python3.11')"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	@mkdir -p .venv/src && ln -sfn ../.. .venv/src/foveal
	@touch $(STAMP)

train: $(STAMP)
	$(BIN)/python train.py $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# models at full size, compiled and exported; machine code of some variants of every kernel; whole training runs
slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow and not gpu and not multigpu and not network" $(ARGS)

# hours: every variant of every kernel compiled for every architecture, every case in Triton's interpreter
exhaustive: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "exhaustive and not gpu and not multigpu and not network" $(ARGS)

# the rule of the compile report, on the main loops of one head dim: see docs/backends.md
rule: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m foveal.kernels.tools.compile_report --arch sm_80 sm_90 gfx942 --dtype bf16 \
	    --operator neighborhood block_sparse window agent --head-dim 128 --grid 18x24x24 8x8 8x7x7 spread --flags "" bias \
	    --kernel forward query key $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache
