# The commands that people and CI run. Each makes .venv first if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Torch first, by exactly its pin. Whose build it is depends on pip's indexes; README says how to take the one without CUDA.
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: demo test lint acceptance bench-head bench-logits bench-step bench-measure study-modes study-overoptimisation study-trust-region clean

$(BIN)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.made  ## SFT, then GRPO without an anchor, with published k3, with exact KL on a budget; table and page
	$(BIN)/kedge train prose out=runs/demo-$$(date +%Y%m%d-%H%M%S)

# What Kedge exists for: covered by its own tests.
HEART := divergence head objective
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope -m 'not acceptance'

test: $(BIN)/.made  ## every test but the long ones, with the coverage of the heart
	$(PYTEST) $(HEART:%=tests/%) $(HEART:%=src/kedge/%) $(HEART:%=--cov=kedge.%) --cov-branch --cov-fail-under=95
	$(PYTEST) $(HEART:%=--ignore=tests/%) $(HEART:%=--ignore=src/kedge/%)

lint: $(BIN)/.made  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

acceptance: $(BIN)/.made  ## what is too long for every run: many kills, many seeds
	$(BIN)/python -m pytest -m acceptance --timeout 7200

# The benchmark's peers live in an environment of their own: PEERS=1 make bench-head
PEERS_VENV := .venv-peers
BENCH_VENV := $(if $(filter 1,$(PEERS)),$(PEERS_VENV),$(VENV))

$(PEERS_VENV)/bin/.made: pyproject.toml constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(PEERS_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . -r benchmarks/peers.txt
	touch $@

bench-head: $(BENCH_VENV)/bin/.made  ## the head beside its bare matrix products and its peers; exit status 1 where a goal falls short
	$(BENCH_VENV)/bin/python -m benchmarks.head $(ARGS)

bench-logits: $(BENCH_VENV)/bin/.made  ## scores of logits in hand beside plain PyTorch and TRL; exit status 1 where a goal falls short
	$(BENCH_VENV)/bin/python -m benchmarks.logits $(ARGS)

bench-step: $(BENCH_VENV)/bin/.made  ## a whole GRPO step beside TRL's; exit status 1 where a goal falls short
	$(BENCH_VENV)/bin/python -m benchmarks.step $(ARGS)

bench-measure: $(VENV)/bin/.made  ## kedge measure beside its parts and the straightforward script; exit status 1 where a goal falls short
	$(VENV)/bin/python -m benchmarks.measure $(ARGS)

study-modes: $(BIN)/.made  ## forward and reverse KL fitted to two peaks; figure and table
	$(BIN)/python -m studies.modes $(ARGS)

study-overoptimisation: $(BIN)/.made  ## proxy and gold against √KL: no anchor, a ladder of β, a ladder of budgets; two hours, resumable
	$(BIN)/python -m studies.overoptimisation $(ARGS)

study-trust-region: $(BIN)/.made  ## clip, penalty, both, masks, nothing, over learning rates; an hour and a half, resumable
	$(BIN)/python -m studies.trust_region $(ARGS)

clean:
	rm -rf $(VENV) $(PEERS_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
