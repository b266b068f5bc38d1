# make demo      prepare the grammar, train, distil, sample, print a table (some ten minutes)
# make test      the linter and the tests, and how long they took
# make results [TEXT=stories.txt]    the losses side by side, three seeds (hours): results/README.md
# Each makes its own virtual environment first. Needs Python 3.10 or newer with venv, and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/installed

.PHONY: demo test results clean

# Differs from the paper's settings to fit a network of 1.0M parameters into some ten minutes.
FLAGS := --data data/grammar --batch-size 128 --micro-batch 128 --beta2 0.99 --ema 0.999 \
	--diagonal-power 0 --log-every 200 --val-every 1000
RUNS := runs/demo-diagonal runs/demo-psd runs/demo-dmd

demo: $(READY)
	$(BIN)/python prepare_data.py grammar
	rm -rf $(RUNS)
	$(BIN)/python train_diagonal.py $(FLAGS) --size tiny --steps 2500 --warmup 100 \
		--cooldown 2400 --lr 2.5e-3 --out runs/demo-diagonal
	$(BIN)/python distill.py $(FLAGS) --checkpoint runs/demo-diagonal --loss psd \
		--divergence square --no-learned-weight --diagonal-from stage1 --diagonal-share 0.25 \
		--boundary 0.2 --steps 500 --warmup 50 --cooldown 450 --lr 1.5e-3 --out runs/demo-psd
	$(BIN)/python distill.py $(FLAGS) --checkpoint runs/demo-psd --loss dmd \
		--steps 2000 --warmup 20 --cooldown 1000 --out runs/demo-dmd
	$(BIN)/python evaluate.py --checkpoint $(RUNS) --nfe 1 2 4 8 64 --gamma 0 1 \
		--num-samples 512 --batch-size 256
	$(BIN)/python sample.py --checkpoint runs/demo-dmd --nfe 1 4 --num-samples 3

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "This takes minutes. At the end: the ten slowest tests, and the time in all."
	$(BIN)/python -m pytest --durations=10

STUDY := $(BIN)/python benchmarks/study.py
JUDGE := $(BIN)/python benchmarks/train_judge.py
PREPARE := $(BIN)/python prepare_data.py file --source "$(TEXT)" --documents paragraph

results: $(READY)
	$(BIN)/python prepare_data.py grammar
	$(STUDY) grammar --only psd lsd esd psd-squared esd-signed
ifdef TEXT
	$(PREPARE) --tokenizer char --seq-len 64 --out data/stories
	test -e runs/judge-stories || $(JUDGE) --data data/stories --out runs/judge-stories \
		--vocab-size 600 --context 64 --steps 1200 --rows 60000
	$(STUDY) stories --only psd lsd esd psd-squared esd-signed
	$(PREPARE) --tokenizer gpt2 --seq-len 32 --out data/bpe
	test -e runs/judge-bpe || $(JUDGE) --data data/bpe --out runs/judge-bpe \
		--vocab-size 2048 --context 64 --steps 1000 --rows 32000
	$(STUDY) bpe --only psd lsd esd psd-squared esd-signed
endif

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10+ is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--editable '.[eval,test]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info
