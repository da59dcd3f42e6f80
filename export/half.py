"""Weights of an ONNX model stored in 16 bits, computed with in 32: half the file, the same speed.

The engine widens them once when it loads the file. Whether a landmark moves by it is for the caller
to check; unlike computing in 16 bits it is the same on every processor.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LEAST = 1024  # values: smaller tensors are not worth a node
SUFFIX = "_in_16_bits"


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its larger weights in 16 bits, each followed by a node that widens it."""
    graph, kept, nodes = model.graph, [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size >= LEAST:
            name = tensor.name + SUFFIX
            nodes.append(helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT))
            tensor = numpy_helper.from_array(values.astype(np.float16), name)  # noqa: PLW2901
        kept.append(tensor)
    return with_content(model, kept, [*nodes, *graph.node])


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with weights of 32 bits again, as tools that change graphs expect them."""
    kept, names = [], set()
    for tensor in model.graph.initializer:
        if tensor.name.endswith(SUFFIX):
            names.add(tensor.name)
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor = numpy_helper.from_array(values, tensor.name.removesuffix(SUFFIX))  # noqa: PLW2901
        kept.append(tensor)
    return with_content(model, kept, [n for n in model.graph.node if not names & set(n.input)])


def with_content(
    model: onnx.ModelProto, tensors: list[onnx.TensorProto], nodes: list[onnx.NodeProto]
) -> onnx.ModelProto:
    """The model with other weights and nodes."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for field, content in ((changed.graph.initializer, tensors), (changed.graph.node, nodes)):
        del field[:]
        field.extend(content)
    return changed
