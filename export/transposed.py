"""Transposed convolutions as plain ones, for engines that have no int8 kernel for them."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.half import with_content
from model.predictor import ModelError


def without_transposed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each transposed convolution as a 1x1 one and a rearrangement of its channels.

    One of size and stride 2 lets no two inputs meet in an output, so that each of the four places
    under an input is a 1x1 convolution of its own (Shi et al. 2016, sub-pixel convolution). The
    rearrangement moves whole pixels, channels last, as the engine keeps them for int8.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    sides = {one.name: [d.dim_value for d in one.type.tensor_type.shape.dim[2:]] for one in known}
    nodes, made = [], []
    for node in model.graph.node:
        if node.op_type != "ConvTranspose":
            nodes.append(node)
            continue
        source, kernel, bias = node.input
        weights = numpy_helper.to_array(tensors[kernel])  # (inputs, outputs, rows, columns)
        inputs, outputs, *size = weights.shape
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        padded = any((*given.get("pads", ()), *given.get("output_padding", ())))
        if not size == [2, 2] == given.get("strides") or padded or given.get("group", 1) != 1:
            raise ModelError(f"{node.name}: expected size and stride 2 and no padding; got {given}")
        rows, columns = sides[source]
        values = {
            "kernel": weights.transpose(2, 3, 1, 0).reshape(4 * outputs, inputs, 1, 1).copy(),
            "bias": np.tile(numpy_helper.to_array(tensors[bias]), 4),
            "apart": np.array([-1, columns, 2, 2 * outputs]),  # (n rows, columns, down, right)
            "whole": np.array([-1, 2 * rows, 2 * columns, outputs]),
        }
        names = {part: f"{node.name}_{part}" for part in values}
        made += [numpy_helper.from_array(array, names[part]) for part, array in values.items()]
        steps: list[tuple[str, list[str], list[int]]] = [
            ("Conv", [names["kernel"], names["bias"]], []),
            ("Transpose", [], [0, 2, 3, 1]),
            ("Reshape", [names["apart"]], []),
            ("Transpose", [], [0, 2, 1, 3]),
            ("Reshape", [names["whole"]], []),
            ("Transpose", [], [0, 3, 1, 2]),
        ]
        for k, (kind, others, perm) in enumerate(steps):
            name = node.output[0] if k == len(steps) - 1 else f"{node.name}_{k}"
            rearranged = helper.make_node(
                kind, [source, *others], [name], f"{node.name}_{k}_{kind}"
            )
            rearranged.attribute.extend([helper.make_attribute("perm", perm)] if perm else [])
            nodes.append(rearranged)
            source = name
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    return with_content(model, kept + made, nodes)
