"""A compiled model inside your own service: ``fastapi run app.py``.

Where one process with one model is enough, this is all it takes. ``sparse-tvm serve`` adds what a
loaded server needs: batching, bounded queues, deadlines, worker processes, new versions, metrics.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

import sparse_tvm

model = sparse_tvm.load(os.environ.get("MODEL", "model.so"))
app = FastAPI()


class Inputs(BaseModel):
    """The model's inputs by name, as nested lists."""

    inputs: dict[str, list[Any]]


# Not `async def`: FastAPI calls it in a thread, and runs of one model take turns by themselves.
@app.post("/run")
def run(request: Inputs) -> dict[str, Any]:
    """Run the model once."""
    dtypes = {spec.name: spec.dtype for spec in model.inputs}
    try:
        arrays = {
            name: np.asarray(values, dtypes.get(name)) for name, values in request.inputs.items()
        }
        outputs = model.run(arrays)
    except (ValueError, sparse_tvm.errors.InputError) as error:
        raise HTTPException(400, str(error)) from error
    return {name: output.tolist() for name, output in outputs.items()}
