# make demo   prepare the grammar, train, distil, sample, and print one table (8 to 10 minutes on 2 cores)
# make test   the tests and the linter
# make results [TEXT=stories.txt]   the losses side by side over three seeds, on the grammar and on a text of yours (hours): results/README.md
# make soak   the fault tests at length: 25 kills, 2,000 steps (about twelve minutes on one core)
# Each makes its own virtual environment first. Needs Python 3.10+ with venv, and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/installed

.PHONY: demo test results soak clean

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

results: $(READY)
	$(BIN)/python prepare_data.py grammar
	$(BIN)/python benchmarks/study.py grammar --only psd lsd esd psd-squared esd-signed-psd-share esd-self-teacher
ifdef TEXT
	$(BIN)/python prepare_data.py file --source "$(TEXT)" --documents paragraph --tokenizer char --seq-len 64 --out data/stories
	test -e runs/judge-stories || $(BIN)/python benchmarks/train_judge.py --data data/stories --out runs/judge-stories --vocab-size 600 --context 64 --steps 1200 --rows 60000
	$(BIN)/python benchmarks/study.py stories --only psd lsd esd psd-squared esd-signed esd-signed-psd-share
	$(BIN)/python prepare_data.py file --source "$(TEXT)" --documents paragraph --tokenizer gpt2 --seq-len 32 --out data/bpe
	test -e runs/judge-bpe || $(BIN)/python benchmarks/train_judge.py --data data/bpe --out runs/judge-bpe --vocab-size 2048 --context 64 --steps 1000 --rows 32000
	$(BIN)/python benchmarks/study.py bpe --only psd lsd esd psd-squared esd-signed-psd-share
endif

soak: $(READY)
	$(BIN)/python -m pytest -n 0 -m soak -s

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[eval,test]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info
