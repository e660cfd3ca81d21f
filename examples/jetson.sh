#!/bin/bash
# From an exported .onnx file to measured labels on a Jetson (docs/deploy/jetson.md says how to install):
#
#     examples/jetson.sh mine-6steps-fp16.onnx photos/ measured/
#
# Builds a plan where TensorRT is there, and takes ONNX Runtime on the CPU where it is not; measures latency and, with the
# board's sensors, energy; then labels the pictures.  PYTHON names another interpreter than python3.
set -euo pipefail

onnx=${1:?the .onnx file}
pictures=${2:?a folder of pictures}
out=${3:-measured}
python=${PYTHON:-python3}
mkdir -p "$out"

# Which power mode the figures are of; `sudo nvpmodel -m 0 && sudo jetson_clocks` is the fastest on most.
if command -v nvpmodel > /dev/null; then nvpmodel -q | tee "$out/power_mode.txt"; else echo "no nvpmodel: not a Jetson"; fi

artifact=$onnx
if "$python" -c 'import tensorrt' 2> /dev/null; then
    artifact=$out/$(basename "${onnx%.onnx}").plan # belongs to this GPU and this TensorRT
    "$python" -m vitrm.export.cli "$onnx" -o "$artifact" --batch 1,1,32
else
    echo "no TensorRT in $python: ONNX Runtime runs $onnx on the CPU"
fi

"$python" -m vitrm.runtime.bench.cli "$artifact" --batch 1,8 --no-eager --seconds "${SECONDS_EACH:-5}" --json "$out/bench.json"
"$python" -m vitrm.runtime.predict.cli "$artifact" "$pictures" --top 1 --csv > "$out/labels.csv"
echo "figures in $out/bench.json, labels in $out/labels.csv"
