#!/usr/bin/env bash
# The embedded recipes from end to end, called by finetune.sh: make a tiny model and the digits,
# convert, train, export, and read digits that the model never saw. For configs/lora/tiny.yaml this
# is done twice: all weights learn the digits 0 to 4 first, and with adapters on that base all ten.
#
#   scripts/tiny.sh CONFIG [a.b=c …] -- LAUNCHER [OPTION …]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
settings=()
while (($#)) && [[ $1 != -- ]]; do
    settings+=("$1")
    shift
done
((${#settings[@]} && $# > 1)) || die "called by finetune.sh, with the launcher after --"
shift
launcher=("$@")

# SIGTERM, SIGHUP and Ctrl-C go to the step that runs, and none follows it
stopped=
trap 'stopped=143 interrupted=1; kill -TERM "$child"' TERM HUP
trap 'stopped=130 interrupted=1; kill -TERM "$child"' INT
step() { # in the background, for bash hears a signal only while it waits
    "$@" &
    child=$!
    await "$child"
    if [[ -n $stopped ]] && ((code == 0 || code == 143)); then exit "$stopped"; fi
    ((code == 0)) || exit "$code"
}

# of several machines only the first makes and measures; the others wait for it where the training
# begins
is_first=$((${NODE_RANK:-0} == 0))

walk() { # CONFIG [a.b=c …]: train, export, and read the digits that were held out
    local save out
    save=$("$python" -m qwen35.config.load "$@" --get training.save)
    out=${OUT:-$save/hf}
    step "${launcher[@]}" "$@"
    if ((is_first)); then
        HF='' DCP=$save OUT=$out step bash scripts/export.sh
        MODEL=$out step bash scripts/evaluate.sh --recipe "$save/config.yaml"
    fi
}

# ARGS are the training's
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # so small a model is quickest on one thread; the training has its own
export ARGS="" DATA=data/digits/heldout.json
export QWEN35_PARENT=$$ # the training ends with this script
if ((is_first)); then
    step "$python" -m qwen35.tools.tiny
    HF=ckpt/hf_path/tiny DCP=ckpt/mm_path/tiny step bash scripts/convert.sh
fi
if [[ ${settings[0]} -ef configs/lora/tiny.yaml ]]; then
    echo "first, the base: all weights of a random model learn the digits 0 to 4"
    OUT='' walk configs/tiny.yaml data.dataset_param.basic_parameters.dataset=data/digits/train_0-4.json \
        training.save=runs/tiny_base training.train_iters=75
    echo "now adapters beside its frozen weights learn all ten digits"
fi
walk "${settings[@]}"
