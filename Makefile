# Every target sets up what it needs: a virtual environment in .venv with the project installed.
# PYTHON=/path/to/python uses that interpreter as it is instead, with nothing installed.

ifdef PYTHON
READY =
else
PYTHON = .venv/bin/python
READY = .venv/ready
endif
CIFAR10 ?= cifar10
LSUN ?= data/bedroom_train_lmdb
AUTOENCODER ?= data/v2-1_512-ema-pruned.ckpt
DANSM = $(PYTHON) dansm.py
NBCONVERT = $(PYTHON) -m nbconvert --log-level WARN --to notebook --inplace tiny/lesson.ipynb

.DEFAULT_GOAL = help
.PHONY: help toy lesson digits cifar10 latent-bedroom test test-all soak lint docs bench bench-train proof clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | awk -F'\t' '{printf "  make %-15s%s\n", $$1, $$2}'
	@echo; echo "  PYTHON=...      use this interpreter as it is, no .venv is made"
	@echo "  CIFAR10=...     a folder of images for make cifar10 (default: download CIFAR-10)"
	@echo "  LSUN=...        for make latent-bedroom: the lmdb, a folder or an archive of images ($(LSUN))"
	@echo "  AUTOENCODER=... Stable Diffusion's, one file or a diffusers folder ($(AUTOENCODER))"
	@echo "  ENCODE=... TRAIN=... SAMPLE=... EVALUATE=...   more options for the stages of make latent-bedroom"

toy: $(READY)  ## what matching does, in 2D: pictures and a table in runs/toy (half a minute)
	$(DANSM) toy

lesson: $(READY)  ## what matching does, step by step: runs tiny/lesson.ipynb anew, in place (half a minute)
	PYTHONPATH="$(CURDIR)" LESSON_OUT="$(CURDIR)/runs/lesson" $(NBCONVERT) --execute --ExecutePreprocessor.record_timing=False
	$(NBCONVERT) --coalesce-streams

digits: $(READY)  ## first images: 1,797 handwritten digits, two ways of pairing, in runs/digits (a minute)
	$(DANSM) digits

cifar10: $(READY)  ## train on CIFAR-10 for eight minutes (on a GPU), samples in runs/cifar10
	$(DANSM) train $(CIFAR10) --network ddpm --batch 256 --lr 3e-4 --ema-decay 0.9999 --minutes 8.2 --sample-steps 20 \
	  --out runs/cifar10

latent-bedroom: $(READY)  ## LSUN encoded, trained on, sampled, FID; each stage resumes where it was stopped
	$(DANSM) encode $(LSUN) --autoencoder $(AUTOENCODER) --out data/latent-bedroom $(ENCODE)
	$(DANSM) train latent-bedroom --all-steps $(TRAIN)
	$(DANSM) sample runs/latent-bedroom --autoencoder $(AUTOENCODER) --steps 5 --out runs/latent-bedroom-samples $(SAMPLE)
	$(DANSM) evaluate runs/latent-bedroom --autoencoder $(AUTOENCODER) --out runs/latent-bedroom-evaluate $(EVALUATE)

test: $(READY)  ## the quick tests (six minutes on two cores)
	$(PYTHON) -m pytest -q -n auto -m "not slow"

test-all: test  ## those, and the slow ones: browser, Triton's interpreter, processes, kills, examples, lesson
	$(PYTHON) -m pytest -q -n auto -m slow

soak: $(READY)  ## kill -9 a run at 50 random moments and resume it, record in results/soak (about ten minutes)
	PYTHONPATH=.:tests $(PYTHON) tests/train/soak.py

lint: $(READY)  ## ruff over everything
	$(PYTHON) -m ruff check .

docs: $(READY)  ## write the tables of all pages from results/, and draw the rooms of the code
	PYTHONPATH=. $(PYTHON) docs/tables.py
	$(PYTHON) docs/rooms.py

bench: $(READY)  ## what matching costs here, and what ways of pairing cost and gain, in runs/bench (three or four minutes)
	$(DANSM) bench match
	$(DANSM) bench couplings $(if $(filter-out cifar10,$(CIFAR10)),--data $(CIFAR10))

bench-train: $(READY)  ## what training costs here: steps, input, sampling, a profile, in runs/bench (for a GPU)
	$(DANSM) bench train

proof: $(READY)  ## does matching pay? trains and evaluates what runs/proof lacks (hours, on a GPU; resumes)
	$(DANSM) proof --data $(CIFAR10) $(PROOF)

clean:  ## remove the environment and the caches; runs and data stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info

.venv/ready: pyproject.toml tests/examples/peers.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -e '.[dev]'
	.venv/bin/python -m pip install --quiet --no-deps -r tests/examples/peers.txt
	touch $@
