"""Calibration: what values the products of a model see on real text, streamed with the state carried.

The exact graph runs on ONNX Runtime with the tensors in question as further outputs, one chunk after the
other; of each only a histogram is kept, so memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from xexport.core.contract import Contract
from xexport.core.progress import Progress, Silent
from xexport.core.state import StateSpec, zero_state
from xexport.quant.ranges import Histogram

__all__ = ["calibrate"]

_CHUNK = 64
_NAME = "calibrate.onnx"


def calibrate(
    graph: Path,
    names: Sequence[str],
    inputs: Any,
    specs: Sequence[StateSpec],
    contract: Contract,
    progress: Progress | None = None,
) -> dict[str, Histogram]:
    """Run a text through the exact graph and count the values of some of its tensors.

    Args:
        graph: the exact dynamic graph on the disk; a copy with more outputs is written beside it.
        names: tensors of its main graph.
        inputs: ids ``[n]`` or features ``[n,F]``, fed as one sequence with the state carried; begun anew
            where the model's stream ends. In the whole form every piece is a sequence of its own.
        specs: the state.
        contract: how the model may be called.

    Returns:
        A histogram a name.
    """
    import onnxruntime as ort

    progress = progress or Silent()
    tapped = graph.with_name(_NAME)
    model = onnx.load(graph, load_external_data=False)
    known = {o.name for o in model.graph.output}
    model.graph.output.extend(onnx.helper.make_value_info(n, _float()) for n in names if n not in known)
    onnx.save(model, tapped)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(tapped), options, providers=["CPUExecutionProvider"])
    found = {name: Histogram() for name in names}
    outputs = [o.name for o in session.get_outputs()]
    size = contract.nearest(_CHUNK)
    pieces = [inputs[at : at + size] for at in range(0, len(inputs) - size + 1, size)]
    if not pieces:  # a text shorter than a chunk
        pieces = [np.resize(inputs, (size, *inputs.shape[1:]))]
    progress.stage("calibrate", total=len(pieces))
    state, fed = zero_state(specs, 1), 0
    feeds = [contract.inputs.name, *(s.name for s in specs)]
    for piece in pieces:
        if contract.max_tokens is not None and fed + size > contract.max_tokens:
            state, fed = zero_state(specs, 1), 0
        values = [contract.batched(piece, 1), *state]
        results = dict(zip(outputs, session.run(None, dict(zip(feeds, values, strict=True))), strict=True))
        for name, histogram in found.items():
            histogram.add(results[name])
        state = [results[name] for name in outputs[1 : 1 + len(specs)]]
        fed += size
        progress.advance()
    tapped.unlink()
    return found


def _float() -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
