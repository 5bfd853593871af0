# Every command. A variable given here, `make finetune NODES=2`, reaches the scripts through the
# environment; env.sh has the meaning and the default of each. `make` prints the commands below by
# stage (scripts/help.awk).

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help install doctor accept download convert export data show finetune report preflight plan rehearse generate predict logprobs evaluate bench test test-npu test-versions test-browser test-trackers test-trl lint docs clean

# A variable that no command reads is misspelt, and `make finetune CONFIGS=…` would train the tiny
# recipe. Beside those of env.sh these are read: MindSpeed-MM's name of NODES, tokens, a compiler, and
# the folders of CANN's logs.
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
known := $(shell sed -n 's/^: "$${\([A-Za-z0-9_]*\):=.*/\1/p' env.sh) NNODES HF_TOKEN MODELSCOPE_API_TOKEN CC ASCEND_PROCESS_LOG_PATH ASCEND_WORK_PATH
unknown := $(filter-out $(known) SHELL MAKE%,$(given))
ifneq ($(unknown),)
$(error $(shell awk -v unknown='$(subst ','\'',$(unknown))' -v known='$(known)' -f scripts/nearest.awk))
endif
# So is one that another command reads, if it says on what: `make finetune DATA=mine.json`.
unread := $(if $(given),$(shell awk -v goals='$(subst ','\'',$(MAKECMDGOALS))' -v given='$(given)' -f scripts/unread.awk env.sh Makefile))
ifneq ($(unread),)
$(error $(unread))
endif
# Of two ARGS="…" make keeps the last: its own command line still has both.
twice := $(if $(given),$(shell tr '\0\n' '\n ' </proc/$$PPID/cmdline | sed -n 's/^\([A-Za-z_][A-Za-z0-9_]*\):*=.*/\1/p' | sort | uniq -d))
ifneq ($(twice),)
$(error $(twice) is given more than once, of which make keeps the last alone: write it once, ARGS="a.b=c d.e=f")
endif
# Values reach the scripts letter for letter: make would expand a $ in PROMPT, and run $(shell …).
$(foreach v,$(given),$(eval override export $v := $$(value $v)))

##@ Set up
install: ## .venv with the exact pins for this machine
#: ARCH DEVICE PYTHON CANN_PATH CANN_VERSION TORCH_NPU TORCH_INDEX DRY_RUN
#> make install DEVICE=npu CANN_VERSION=9.1 DRY_RUN=1
doctor: ## checks machine, recipe and data; each line is ok, or says what is wrong and what to do
#: CONFIG ARGS="settings"
#> make doctor CONFIG=configs/qwen3_5_4B.yaml
accept: ## first on a machine with NPUs: does it compute what it should, and how fast? writes one report
#: NPUS_PER_NODE ASCEND_RT_VISIBLE_DEVICES ARGS="options"
#> make accept ARGS="--only operators layers"

##@ Weights
download: ## a model from a hub, every file checked; resumes where it was stopped
#: MODEL=<name on the hub, Qwen/ may be left out> SOURCE OUT=ckpt/hf_path/<name> ARGS="options"
#> make download MODEL=Qwen3.8-27B SOURCE=modelscope
convert: ## a Hugging Face folder to a DCP checkpoint, for training.load
#: HF DCP=ckpt/mm_path/<name of HF> TIE ARGS="options"
#> make convert HF=ckpt/hf_path/Qwen3.5-4B

##@ Data
data: ## LLaVA-Instruct and COCO images to training records, checked, with a report; or how long your own are
#: LLAVA IMAGES
#: OUT=data/mllm_format_llava_instruct_data.json HF=<model whose tokens are counted> ARGS="options"
#: DATA=<your records> HF=<model whose tokens are counted> ARGS="options"
#> make data HF=ckpt/hf_path/Qwen3.5-4B ARGS="--on_missing skip"
show: ## samples of a recipe as the model sees them, the trained tokens marked; ARGS=--lengths: how long all are
#: CONFIG ARGS="settings and options"
#> make show CONFIG=configs/qwen3_5_4B.yaml

##@ Train
rehearse: ## one step on a virtual cluster of NPUs: does it fit, and what does it send?
#: CONFIG NODES NPUS_PER_NODE=8 NPU_MEMORY_GB RATES ARGS="settings and options"
#> make rehearse CONFIG=configs/qwen3_5_35B-A3B.yaml NODES=2
plan: ## which layout is fastest and fits? prints a table, and the lines for the recipe
#: CONFIG NODES NPUS_PER_NODE=8 NPU_MEMORY_GB TOKENS_PER_STEP RATES ARGS="settings and options"
#> make plan CONFIG=configs/qwen3_5_35B-A3B.yaml NODES=2
preflight: ## do the machines of a run agree, and how fast do they talk? trains nothing
#: as for finetune
#> HOSTS=machines.txt make preflight CONFIG=configs/qwen3_5_27B.yaml
finetune: ## train; without variables, a tiny model learns to read digits, from nothing to a score
#: CONFIG NPUS_PER_NODE ARGS="settings" DRY_RUN
#: NODES NODE_RANK NODE_ADDR MASTER_ADDR MASTER_PORT, or HOSTS HOSTS_DIR SSH
#> make finetune CONFIG=configs/qwen3_5_4B.yaml ARGS="training.train_iters=20 training.lr=2e-5"

report: ## a page on a run: its plots, samples, answers and settings; training writes it at each save, too
#: RUN=runs/tiny ARGS="options"
#> make report RUN=runs/a,runs/b

##@ Use
export: ## a checkpoint of a run to a Hugging Face folder, for transformers and vLLM
#: DCP=runs/tiny HF=<model that the run trained> OUT=<DCP>/hf ARGS="options"
#> make export DCP=runs/qwen3_5_4B
generate: ## a model's answer about images, videos and text
#: MODEL=runs/tiny/hf PROMPT=<text, else standard input> IMAGE VIDEO HF ARGS="options"
#> make generate IMAGE=data/digits/images/0000.png PROMPT='Which digit is this?'
predict: ## a model's answers to a data set, a line of JSON each; resumes where it was stopped
#: MODEL=runs/tiny/hf DATA OUT=<file to write> HF ARGS="options"
#> make predict MODEL=runs/qwen3_5_4B/hf DATA=data/questions.json OUT=answers.jsonl ARGS="--dataset_dir data/COCO2017"
logprobs: ## log-probabilities of given answers, a line of JSON each; of a DPO recipe's reference, without OUT
#: CONFIG DATA OUT=<file to write> NPUS_PER_NODE ARGS="settings" DRY_RUN
#> make logprobs CONFIG=configs/qwen3_5_4B.yaml DATA=data/answers.json OUT=logprobs.jsonl
evaluate: ## ask a model about held-out records, and count the right answers
#: MODEL=runs/tiny/hf DATA ARGS="options"
#> make evaluate MODEL=runs/qwen3_5_4B/hf DATA=data/heldout.json ARGS="--dataset_dir data/COCO2017"

##@ Prove
test: ## all tests, on a CPU, including those of test-npu
#: ARGS="options of pytest"
#> make test ARGS="-m quick"
test-npu: ## the NPU code, as far as it can be tested without an NPU: the real torch_npu on stand-ins for CANN
#: TORCH ARGS="options of pytest"
#> make test-npu TORCH=2.10.0
test-versions: ## the tests on other versions of transformers, torch and Python
#: TRANSFORMERS TORCH PYTHON TORCH_INDEX ARGS="options of pytest"
#> make test-versions TORCH=2.7.1
test-browser: ## the page of a run in a headless Chromium, which apt-get installs if it is missing
#: ARGS="options of pytest"
#> make test-browser
test-trackers: ## runs that report to TensorBoard, wandb, SwanLab and MLflow, read back from their files
#: ARGS="options of pytest"
#> make test-trackers
test-trl: ## losses and gradients of preference pairs beside those of trl's own trainer
#: ARGS="options of pytest"
#> make test-trl
bench: ## speed and memory beside transformers' model and bare matmuls, as ratios
#: ARGS="options"
#> make bench ARGS="--only moe"

##@ Develop
help: ## this list
lint: ## ruff, mypy, shellcheck, hadolint
docs: ## generate docs/settings.md and docs/environment.md
clean: ## remove what the tools and the tiny recipe made; .venv stays

help:
	@awk -f scripts/help.awk env.sh Makefile

install:
	@bash scripts/install.sh

doctor: # works without an installation too
	@bash scripts/doctor.sh

accept download convert export data show finetune report preflight plan rehearse generate predict logprobs evaluate bench test test-npu test-versions test-browser test-trackers test-trl lint docs: .venv/.installed
	@bash scripts/$@.sh

# the stamp that a finished install leaves; a newer lock file brings .venv up to date
.venv/.installed: $(wildcard scripts/requirements/*.txt)
	@bash scripts/install.sh

clean:
	rm -rf build .mypy_cache .ruff_cache .hypothesis ckpt/hf_path/tiny ckpt/mm_path/tiny data/digits runs/tiny runs/tiny_base runs/tiny_lora
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
