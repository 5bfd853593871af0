#!/usr/bin/env bash
# Ask a model about images, videos and text, and print its answer.
#
#   MODEL=<Hugging Face folder, or DCP checkpoint> [IMAGE=a.png,b.png] [VIDEO=<file, folder of frames, or a.png,b.png,…>] \
#       PROMPT='…' [HF=<model folder>] [ARGS="more options"] scripts/generate.sh
#
# A DCP checkpoint of a run is asked with the model folder that the run trained, if HF is not given
# outside of env.sh. Without PROMPT the text comes from standard input.
given_hf=${HF:-}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
asks
split "${ARGS:-}"
options=(--model "$MODEL")
if [[ -n $given_hf || ! (-f $MODEL/config.yaml || -f $MODEL/../config.yaml) ]]; then options+=(--hf "$HF"); fi
if [[ -n ${IMAGE:-} ]]; then
    IFS=, read -ra images <<<"$IMAGE"
    options+=(--image "${images[@]# }")
fi
if [[ -n ${VIDEO:-} ]]; then
    IFS=';' read -ra videos <<<"$VIDEO"
    for video in "${videos[@]}"; do
        IFS=, read -ra frames <<<"$video"
        options+=(--video "${frames[@]# }")
    done
fi
if [[ -n ${PROMPT:-} ]]; then options+=("--prompt=$PROMPT"); fi
exec "$python" -m qwen35.inference.generate "${options[@]}" "${words[@]}" "$@"
