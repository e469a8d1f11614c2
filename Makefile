# The commands that people and CI run. Each makes .venv first if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch, so that nothing draws gigabytes of CUDA packages; README says how to install for a GPU.
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: demo test lint acceptance clean

$(BIN)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.made  ## SFT, then GRPO without an anchor, with published k3, with exact KL on a budget; table and page
	$(BIN)/kedge train prose out=runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(BIN)/.made  ## every test but the long ones, with the coverage of the heart
	$(BIN)/python -m pytest -n 2 --dist loadscope -m 'not acceptance' --cov=kedge.divergence --cov=kedge.head --cov=kedge.objective \
		--cov-branch --cov-fail-under=95

lint: $(BIN)/.made  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

acceptance: $(BIN)/.made  ## what is too long for every run: many kills, many seeds
	$(BIN)/python -m pytest -m acceptance --timeout 7200

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
