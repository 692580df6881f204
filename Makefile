# The commands of the book. `make help` lists them; each is described by the text after its ##.

.DEFAULT_GOAL := help

# Any Python from 3.11 on; `make book PYTHON=/path/to/python3.12` chooses one.
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	echo "$$name"; break; fi; done)
endif
ifeq ($(PYTHON),)
$(error Python 3.11 or later is needed and none was found; install it, or name it: make PYTHON=/path/to/python3)
endif

TASKS := "$(PYTHON)" tools/tasks.py
PORT ?= 8000
NB ?=
URL ?=
ONLY ?=

.PHONY: help book serve test fast lint notebooks colab repository mutants canaries bench clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

book: ## build the pages into _build/html and print their address
	@$(TASKS) book

serve: ## show the built pages at http://127.0.0.1:8000/ (PORT=8001 for another port)
	@$(TASKS) serve $(PORT)

test: ## run everything: lint, tests, the built pages, every notebook
	@$(TASKS) test

fast: ## run the quick tests only
	@$(TASKS) fast

lint: ## check style and formatting
	@$(TASKS) lint

notebooks: ## execute the chapters again in place (NB=chapters/01-attention.ipynb for one)
	@$(TASKS) run tools/execute.py $(NB)

colab: ## write colab/ again from chapters/
	@$(TASKS) run tools/colab.py

repository: ## move the book to another address (URL=https://github.com/owner/name)
	@$(TASKS) run tools/repository.py $(URL)

mutants: ## check that the tests catch every known bug of tests/mutants
	@$(TASKS) run tools/mutants.py $(ONLY)

canaries: ## check that the tests turn red when the book is broken
	@$(TASKS) run tools/canaries.py $(ONLY)

bench: ## measure speed and memory beside the reference implementations
	@$(TASKS) run benchmarks/run.py

clean: ## remove everything that the commands made
	@$(TASKS) clean
