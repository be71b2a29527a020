# Every target sets up what it needs: a virtual environment in .venv with the project installed.
# PYTHON=/path/to/python uses that interpreter as it is instead, with nothing installed.

ifdef PYTHON
READY =
else
PYTHON = .venv/bin/python
READY = .venv/ready
endif
CIFAR10 ?= cifar10
DANSM = $(PYTHON) dansm.py

.DEFAULT_GOAL = help
.PHONY: help toy digits cifar10 test soak lint bench bench-train clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | awk -F'\t' '{printf "  make %-12s%s\n", $$1, $$2}'
	@echo; echo "  PYTHON=...      use this interpreter as it is, no .venv is made"
	@echo "  CIFAR10=...     a folder of images for make cifar10 (default: download CIFAR-10)"

toy: $(READY)  ## what matching does, in 2D: pictures and a table in runs/toy (about a minute)
	$(DANSM) toy

digits: $(READY)  ## first images: 1,797 handwritten digits, two ways of pairing, in runs/digits (three minutes)
	$(DANSM) digits

cifar10: $(READY)  ## train on CIFAR-10 for eight minutes (on a GPU), samples in runs/cifar10
	$(DANSM) train $(CIFAR10) --network ddpm --batch 256 --lr 3e-4 --decay 0.9999 --minutes 8.2 --sample-steps 20 \
	  --out runs/cifar10

test: $(READY)  ## all tests (seven minutes on two cores)
	$(PYTHON) -m pytest -q

soak: $(READY)  ## kill -9 a run at 50 random moments and resume it, record in results/soak (about ten minutes)
	PYTHONPATH=. $(PYTHON) tests/soak.py

lint: $(READY)  ## ruff over everything
	$(PYTHON) -m ruff check .

bench: $(READY)  ## what matching costs here: the paper's loop, other libraries, ours, in runs/bench (a minute or two)
	$(DANSM) bench match

bench-train: $(READY)  ## what training costs here: steps, input, sampling, a profile, in runs/bench (for a GPU)
	$(DANSM) bench train

clean:  ## remove the environment and the caches; runs and data stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info

.venv/ready: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -e '.[dev]'
	.venv/bin/python -m pip install --quiet --no-deps torchcfm
	touch $@
