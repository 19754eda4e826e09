#!/bin/sh
# Measure all speed figures of an NVIDIA GPU, and write them as JSON: benchmarks/gpu.sh FOLDER
set -eu
out=${1:?"folder for the JSON files"}
cd "$(dirname "$0")/.."
mkdir -p "$out"
decode="python3 benchmarks/decoding_speed.py --device cuda --rounds 3"
large="--image-shape 3 32 32 --filters 160 --resnets 5 --eps 16"
$decode $large --batch 1 1024 --bf16 --output "$out/gpu-decoding-rgb-160x5-bf16.json"
$decode $large --batch 1 1024 --output "$out/gpu-decoding-rgb-160x5.json"
$decode --filters 40 --resnets 5 --batch 1 256 2048 --output "$out/gpu-decoding-40x5.json"
train="python3 benchmarks/training_speed.py --batch 128 --rounds 3 --seconds 2"
$train --filters 40 --resnets 5 --out "$out/gpu-training-40x5.json"
python3 benchmarks/scoring_speed.py --filters 40 --resnets 5 --images 5000 --out "$out/gpu-scoring-40x5.json"
python3 benchmarks/training_speed.py --filters 24 --resnets 2 --rounds 3 --seconds 1 --losses 300 \
    --out "$out/gpu-training-24x2.json" # batches of 16
