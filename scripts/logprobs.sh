#!/usr/bin/env bash
# Log-probabilities of answers that are there, by the weights that a recipe starts from: of each
# sample a line of JSON with the tokens that would be trained, and the log-probability of each.
#
#   CONFIG=<recipe> DATA=<records> OUT=<logprobs.jsonl> [ARGS="a.b=c …"] scripts/logprobs.sh [a.b=c …]
#   CONFIG=<recipe of training.stage: dpo> scripts/logprobs.sh    those of the reference, into its cache_dir
#
# It runs where `make finetune` would, with the same variables; not over HOSTS.
out=${OUT:-} data=${DATA:-}
unset OUT DATA # elsewhere they are where an export goes, and what is asked
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ -z ${HOSTS:-} ]] || die "HOSTS=$HOSTS: make logprobs starts on each machine by NODES and NODE_RANK; leave HOSTS out"
[[ -z $data || -n $out ]] || die "OUT is not set: name the file for the log-probabilities, OUT=logprobs.jsonl"
exec bash scripts/finetune.sh --logprobs "${out:--}" ${data:+"data.dataset_param.basic_parameters.dataset=$data"} "$@"
