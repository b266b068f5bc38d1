# make demo   prepare the grammar, train, distil, sample, and print one table (about 8 minutes on 2 cores)
# make test   the tests and the linter
# Each makes its own virtual environment first. Needs Python 3.10+ with venv, and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/installed

.PHONY: demo test clean

demo: $(READY)
	$(BIN)/python prepare_data.py grammar
	rm -rf runs/grammar-diagonal runs/grammar-psd
	$(BIN)/python train_diagonal.py --data data/grammar --size tiny $(STAGE1)
	$(BIN)/python distill.py --data data/grammar --loss psd $(STAGE2)
	$(BIN)/python evaluate.py --checkpoint runs/grammar-diagonal/checkpoint.pt runs/grammar-psd/checkpoint.pt --nfe 1 2 4 16 64 --show 3

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[eval,test]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info
