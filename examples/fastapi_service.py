"""A classification service: FastAPI in front of an exported model.  It needs neither torch nor the training data.

    pip install 'vitrm[examples]'
    VITRM_ARTIFACT=mine.onnx uvicorn --app-dir examples fastapi_service:app
    curl --data-binary @photo.jpg localhost:8000/predict?top=3

One process has one model; `uvicorn --workers N` starts several.  For batches across requests take Triton (triton_client.py).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool

import vitrm.runtime

MOST_BYTES = 32 << 20  # of a picture

session = vitrm.runtime.open(
    os.environ.get("VITRM_ARTIFACT", "model.onnx"),
    device=os.environ.get("VITRM_DEVICE", "cpu"),
    threads=int(os.environ.get("VITRM_THREADS", "1")),  # requests run beside each other: one thread each serves most
)
app = FastAPI(title="ViTRM")


@app.get("/health")
def health() -> dict[str, Any]:
    """Says that the model is loaded, and which."""
    own = session.metadata
    return {"model": own.run, "classes": len(own.class_names), "image_size": own.image_size, "steps": own.steps}


@app.post("/predict")
async def predict(request: Request, top: int = Query(5, ge=1, le=1000)) -> dict[str, Any]:
    """Classifies the picture in the request's body."""
    body = bytearray()
    async for chunk in request.stream():  # never more of it in memory than is allowed
        body += chunk
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"the picture has more than {MOST_BYTES >> 20} MB")
    return await run_in_threadpool(_classify, bytes(body), top)  # other requests are answered meanwhile


def _classify(body: bytes, top: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vitrm-") as folder:
        picture = Path(folder) / "picture"
        picture.write_bytes(body)
        (prediction,) = session.predict([picture], top=top)
    if prediction.error is not None:
        raise HTTPException(422, prediction.error.replace(str(picture), "the request's body"))
    answer = prediction.to_dict()
    del answer["path"]
    return answer
