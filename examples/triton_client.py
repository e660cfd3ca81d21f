"""Pictures to a Triton Inference Server, labels back.

    vitrm-export runs/mine --steps 6 --fp16 --triton models --triton-name mine
    tritonserver --model-repository=models
    pip install 'vitrm[examples]'
    python examples/triton_client.py mine models/mine/labels.txt photos/*.jpg

The client prepares the pictures as the model's configuration says training did; normalization is inside the model.  Requests are
sent side by side, so that the server can batch them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import tritonclient.http as triton

from vitrm.preprocessing import Preprocessing
from vitrm.runtime.predict import prepare

AT_ONCE = 16  # requests on their way


def main() -> None:
    """Prints a line a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model's name in the repository")
    parser.add_argument("labels", type=Path, help="the model's labels.txt")
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--url", default="localhost:8000")
    args = parser.parse_args()
    labels = args.labels.read_text(encoding="utf-8").splitlines()

    with triton.InferenceServerClient(args.url, concurrency=AT_ONCE) as client:
        inputs = {entry["name"]: entry for entry in client.get_model_metadata(args.model)["inputs"]}
        preprocessing = _preprocessing(client.get_model_config(args.model), int(inputs["pixel_values"]["shape"][-1]))
        for start in range(0, len(args.pictures), AT_ONCE):
            some = args.pictures[start : start + AT_ONCE]
            waiting = [
                client.async_infer(args.model, _request(prepare(picture, preprocessing), inputs)) for picture in some
            ]
            for picture, sent in zip(some, waiting, strict=True):
                answer = sent.get_result()
                logits = answer.as_numpy("logits").ravel()
                best, used = int(logits.argmax()), answer.as_numpy("steps_used")
                chance = np.exp(logits[best] - np.logaddexp.reduce(logits))
                steps = "" if used is None else f"  [{int(used.ravel()[0])} steps]"
                print(f"{picture}  {labels[best]} {100 * chance:.1f} %{steps}")


def _preprocessing(config: dict, side: int) -> Preprocessing:
    """Reads how pictures become pixels: the model's parameters say so; those of earlier exports do not, which had one way alone."""
    said = config.get("parameters", {}).get("vitrm_preprocessing")
    return Preprocessing.recorded(said and json.loads(said["string_value"]), side, "the model's configuration")


def _request(pixels: np.ndarray, inputs: dict) -> list:
    """The inputs of a request for one picture; a loop's depth and threshold, too."""
    values = {"pixel_values": pixels[None].astype(np.float32)}
    if "steps" in inputs:
        values |= {"steps": np.array([6], np.int64), "halt_threshold": np.array([0.9], np.float32)}
    request = []
    for name, value in values.items():
        entry = triton.InferInput(name, list(value.shape), inputs[name]["datatype"])
        entry.set_data_from_numpy(value)
        request.append(entry)
    return request


if __name__ == "__main__":
    main()
