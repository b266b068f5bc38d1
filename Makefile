# make demo   prepare the grammar, train, distil, sample, and print one table (about 10 minutes on 2 cores)
# make test   the tests and the linter
# make soak   the fault tests at length: 25 kills, 2,000 steps (about twelve minutes on one core)
# Each makes its own virtual environment first. Needs Python 3.10+ with venv, and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/installed

.PHONY: demo test soak clean

# What differs from the paper's settings fits a network of 1.0M parameters to ten minutes: see README.md.
FLAGS := --data data/grammar --batch-size 128 --micro-batch 128 --beta2 0.99 --ema 0.999 --diagonal-power 0 --log-every 200 --val-every 1000
RUNS := runs/grammar-diagonal runs/grammar-psd

demo: $(READY)
	$(BIN)/python prepare_data.py grammar
	rm -rf $(RUNS)
	$(BIN)/python train_diagonal.py $(FLAGS) --size tiny --steps 2500 --warmup 100 --cooldown 2400 --lr 2.5e-3
	$(BIN)/python distill.py $(FLAGS) --loss psd --divergence square --no-learned-weight --diagonal-from stage1 --steps 850 --warmup 50 --cooldown 800 --lr 1.5e-3 --diagonal-share 0.25 --boundary 0.2
	$(BIN)/python evaluate.py --checkpoint $(RUNS:=/checkpoint.pt) --nfe 1 2 4 8 64 --num-samples 512 --batch-size 256 --bleu-samples 0 --show 3 --plot runs/demo.png

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

soak: $(READY)
	$(BIN)/python -m pytest -n 0 -m soak -s

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[eval,test]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info
