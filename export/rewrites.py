"""Rewrites of ONNX models: weights in 16 bits, and graphs that suit int8 kernels.

`halve_weights` stores weights in 16 bits, and the network still computes in 32. That halves the
file at the same speed, because the engine widens the weights once, when it loads the file. The
result is the same on every processor, which it would not be if the network computed in 16 bits. The
caller has to check that no landmark moves.

`rewrite_for_int8` writes the same network so that the engine's int8 kernels run most of it, and
quickly. None of its rewrites changes a value. Each takes a float32 model as export.to_onnx writes
it, for any kind and size of network.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Values = dict[str, npt.NDArray[Any]]
Step = tuple[str, Sequence[str], dict[str, Any]]  # kind, inputs after the first one, attributes
CHANNELS_LAST: Step = ("Transpose", (), {"perm": [0, 2, 3, 1]})
CHANNELS_FIRST: Step = ("Transpose", (), {"perm": [0, 3, 1, 2]})
SWAP_MIDDLE: Step = ("Transpose", (), {"perm": [0, 2, 1, 3]})
LEAST_HALVED_VALUES = 1024  # a smaller tensor is not worth a node
HALVED_SUFFIX = "_in_16_bits"  # added to the name of a tensor whose weights are stored so


def halve_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its larger weights in 16 bits, and a node behind each that widens it."""
    graph, tensors, nodes = model.graph, [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size >= LEAST_HALVED_VALUES:
            name = tensor.name + HALVED_SUFFIX
            nodes.append(helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT))
            tensor = numpy_helper.from_array(values.astype(np.float16), name)  # noqa: PLW2901
        tensors.append(tensor)
    return replace_contents(model, tensors, [*nodes, *graph.node])


def widen_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all weights in 32 bits again, as tools that change graphs expect them."""
    tensors, names = [], set()
    for tensor in model.graph.initializer:
        if tensor.name.endswith(HALVED_SUFFIX):
            names.add(tensor.name)
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor = numpy_helper.from_array(values, tensor.name.removesuffix(HALVED_SUFFIX))  # noqa: PLW2901
        tensors.append(tensor)
    return replace_contents(
        model, tensors, [n for n in model.graph.node if not names & set(n.input)]
    )


def replace_contents(
    model: onnx.ModelProto, tensors: list[onnx.TensorProto], nodes: list[onnx.NodeProto]
) -> onnx.ModelProto:
    """A copy of the model with other weights and nodes."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for field, content in ((changed.graph.initializer, tensors), (changed.graph.node, nodes)):
        del field[:]
        field.extend(content)
    return changed


class Graph:
    """A model whose nodes can be replaced, with its weights and the shapes of its tensors by name.

    replaced: name of a node -> the nodes that stand in its place.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.weights = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
        known = onnx.shape_inference.infer_shapes(model).graph
        self.shapes = {
            one.name: [size.dim_value for size in one.type.tensor_type.shape.dim]
            for one in (*known.input, *known.value_info, *known.output)
        }
        self.new_weights: Values = {}
        self.replaced: dict[str, list[onnx.NodeProto]] = {}

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that returns a tensor; None for weights and for the graph's input."""
        return next((node for node in self.model.graph.node if name in node.output), None)

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that take a tensor."""
        return [node for node in self.model.graph.node if name in node.input]

    def bias(self, node: onnx.NodeProto, outputs: int) -> npt.NDArray[Any]:
        """(outputs,) bias of a convolution; zeros if the file leaves it out."""
        return self.weights[node.input[2]] if len(node.input) > 2 else np.zeros(outputs, np.float32)

    def replace(
        self, last: onnx.NodeProto, source: str, steps: Iterable[Step], weights: Values
    ) -> None:
        """Put a chain of steps in place of a node; the last step returns the node's output.

        Args:
            source: name of the tensor that the first step takes.
            weights: the steps' own weights; in a step's inputs `:part` stands for weights[part].
        """
        self.new_weights |= {f"{last.name}:{part}": array for part, array in weights.items()}
        nodes: list[onnx.NodeProto] = []
        for k, (kind, others, attributes) in enumerate(steps):
            inputs = [f"{last.name}{one}" if one.startswith(":") else one for one in others]
            name = f"{last.name}_{k}_{kind}"
            outputs = [f"{name}_{j}" for j in range(3)] if kind == "Split" else [name]
            taken = [*nodes[-1].output] if nodes else [source]
            nodes.append(helper.make_node(kind, [*taken, *inputs], outputs, name, **attributes))
        nodes[-1].output[:] = last.output
        self.replaced[last.name] = nodes

    def build_model(self) -> onnx.ModelProto:
        """The model with the replacements and without unused nodes and weights."""
        nodes = [n for node in self.model.graph.node for n in self.replaced.get(node.name, [node])]
        used, used_nodes = {one.name for one in self.model.graph.output}, []
        for node in reversed(nodes):
            if used & {*node.output}:
                used |= {*node.input}
                used_nodes.append(node)
        weights = [one for one in self.model.graph.initializer if one.name in used]
        weights += [
            numpy_helper.from_array(array, name) for name, array in self.new_weights.items()
        ]
        changed = replace_contents(self.model, weights, used_nodes[::-1])
        if any(node.domain for node in used_nodes):
            changed.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return changed


def rewrite_for_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all rewrites below."""
    for rewrite in (rewrite_stem, rewrite_transposed, rewrite_heads, fuse_attention):
        graph = Graph(model)
        rewrite(graph)
        model = graph.build_model()
    return model


def _steps_spreading_channels(rows: int, columns: int, channels: int) -> tuple[list[Step], Values]:
    """Steps from (n, 4 channels, rows, columns) to (n, channels, 2 rows, 2 columns).

    The channels hold the four pixels under a cell, row by row. The steps move whole pixels with
    their channels last, as the engine keeps them for int8. The second value is their weights.
    """
    apart = np.array([-1, columns, 2, 2 * channels])  # (n rows, columns, down, right and channel)
    whole = np.array([-1, 2 * rows, 2 * columns, channels])
    reshapes: list[Step] = [("Reshape", [":apart"], {}), ("Reshape", [":whole"], {})]
    steps = [CHANNELS_LAST, reshapes[0], SWAP_MIDDLE, reshapes[1], CHANNELS_FIRST]
    return steps, {"apart": apart, "whole": whole}


def rewrite_stem(graph: Graph) -> None:
    """Write a first 3x3 convolution of stride 2 on one channel as 2x2 on blocks of 4x4 pixels.

    The engine reads a single channel byte by byte, but 16 channels at once.
    """
    image = graph.model.graph.input[0].name
    for node in graph.consumers(image):
        weights = graph.weights.get(node.input[1]) if node.op_type == "Conv" else None
        relu = graph.consumers(node.output[0])
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        suits = attributes.get("strides") == [2, 2] and attributes.get("pads") == [1] * 4
        if weights is None or weights.shape[1:] != (1, 3, 3) or not suits:
            continue
        if [one.op_type for one in relu] != ["Relu"]:
            continue
        rows, columns = (side // 4 for side in graph.shapes[image][2:])
        outputs = len(weights)
        kernel = np.zeros((2, 2, outputs, 4, 4, 2, 2), np.float32)
        for a, b, y, x in np.ndindex(2, 2, 3, 3):  # places of an output in its block, of a weight
            row, column = 2 * a + y - 1, 2 * b + x - 1
            place = (row % 4, column % 4, 1 + row // 4, 1 + column // 4)
            kernel[(a, b, slice(None), *place)] = weights[:, 0, y, x]
        steps, values = _steps_spreading_channels(rows, columns, outputs)
        values |= {
            "lines": np.array([-1, 4, columns, 4]),
            "blocks": np.array([-1, rows, columns, 16]),
            "kernel": kernel.reshape(4 * outputs, 16, 2, 2),
            "bias": np.tile(graph.bias(node, outputs), 4),
        }
        gathering: list[Step] = [
            ("Reshape", [":lines"], {}),
            SWAP_MIDDLE,
            ("Reshape", [":blocks"], {}),
            CHANNELS_FIRST,
            ("Conv", [":kernel", ":bias"], {"pads": [1, 1, 0, 0]}),
            ("Relu", (), {}),
        ]
        graph.replace(relu[0], image, [*gathering, *steps], values)


def rewrite_transposed(graph: Graph) -> None:
    """Write transposed convolutions as 1x1 ones, whose channels are then spread.

    There is no int8 kernel for them. With size and stride 2 no two inputs meet in an output. So
    each of the four pixels under an input is a 1x1 convolution of its own (Shi et al. 2016,
    sub-pixel convolution).
    """
    for node in graph.model.graph.node:
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        odd = any((*attributes.get("pads", ()), *attributes.get("output_padding", ())))
        if node.op_type != "ConvTranspose" or attributes.get("strides") != [2, 2] or odd:
            continue
        source, name = node.input[:2]
        kernel = graph.weights[name]  # (inputs, outputs, rows, columns)
        inputs, outputs, *size = kernel.shape
        if size != [2, 2] or attributes.get("group", 1) != 1:
            continue
        rows, columns = graph.shapes[source][2:]
        steps, values = _steps_spreading_channels(rows, columns, outputs)
        values |= {
            "kernel": kernel.transpose(2, 3, 1, 0).reshape(4 * outputs, inputs, 1, 1).copy(),
            "bias": np.tile(graph.bias(node, outputs), 4),
        }
        graph.replace(node, source, [("Conv", [":kernel", ":bias"], {}), *steps], values)


def rewrite_heads(graph: Graph) -> None:
    """Write the heads' 1x1 convolutions as matrix products: int8 weights, but not int8 results."""
    for node in graph.model.graph.node:
        if node.op_type == "Conv" and re.match(r"(members\.\d+\.)?head\.", node.input[1]):
            weights = graph.weights[node.input[1]][:, :, 0, 0].T.copy()
            values = {"weights": weights, "bias": graph.bias(node, weights.shape[1])}
            product: list[Step] = [("MatMul", [":weights"], {}), ("Add", [":bias"], {})]
            graph.replace(node, node.input[0], [CHANNELS_LAST, *product, CHANNELS_FIRST], values)


def fuse_attention(graph: Graph) -> None:
    """Write self-attention, a softmax and the nodes around it, as one node of the engine."""
    for node in graph.model.graph.node:
        scores = graph.producer(node.input[0]) if node.op_type == "Softmax" else None
        if scores is None or scores.op_type != "MatMul":
            continue
        first, last = scores, node  # from query, key and value in one tensor to the result
        while first.op_type != "Reshape" and (before := graph.producer(first.input[0])):
            first = before
        while last.op_type != "Reshape":
            last = graph.consumers(last.output[0])[0]
        _, _, three, heads, width = graph.shapes[first.output[0]]
        values = {"widths": np.full(three, heads * width)}
        steps: list[Step] = [
            ("Split", [":widths"], {"axis": 2}),
            ("MultiHeadAttention", (), {"num_heads": heads, "domain": "com.microsoft"}),
        ]
        graph.replace(last, first.input[0], steps, values)
