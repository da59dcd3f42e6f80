"""ONNX models written in another way: weights in 16 bits, and graphs that suit int8 kernels.

`halved` stores weights in 16 bits and computes in 32: half the file at the same speed. The engine
widens them once, when it loads the file. The caller has to check whether a landmark moves. Unlike
computing in 16 bits, the result is the same on every processor.

`rewritten` writes the same network so that the engine's int8 kernels take most of it, and quickly.
None of its rewrites changes a value. Each takes a model in float32 as export.to_onnx writes this
project's networks, of any kind and size.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Values = dict[str, npt.NDArray[Any]]
Step = tuple[str, Sequence[str], dict[str, Any]]  # kind, inputs besides the one before, attributes
TO_LAST: Step = ("Transpose", (), {"perm": [0, 2, 3, 1]})
TO_FIRST: Step = ("Transpose", (), {"perm": [0, 3, 1, 2]})
SWAPPED: Step = ("Transpose", (), {"perm": [0, 2, 1, 3]})
LEAST_HALVED = 1024  # values: a smaller tensor is not worth a node
SUFFIX = "_in_16_bits"


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its larger weights in 16 bits, each followed by a node that widens it."""
    graph, kept, nodes = model.graph, [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size >= LEAST_HALVED:
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


class Graph:
    """A model's nodes, to be replaced, with its weights and shapes by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.weights = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
        known = onnx.shape_inference.infer_shapes(model).graph
        self.shapes = {
            one.name: [size.dim_value for size in one.type.tensor_type.shape.dim]
            for one in (*known.input, *known.value_info, *known.output)
        }
        self.made: Values = {}
        self.replaced: dict[str, list[onnx.NodeProto]] = {}

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a tensor; None for weights and for the graph's input."""
        return next((node for node in self.model.graph.node if name in node.output), None)

    def users(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that take a tensor."""
        return [node for node in self.model.graph.node if name in node.input]

    def bias(self, node: onnx.NodeProto, outputs: int) -> npt.NDArray[Any]:
        """(outputs,) the bias of a convolution; an exporter leaves it out if it is zero."""
        return self.weights[node.input[2]] if len(node.input) > 2 else np.zeros(outputs, np.float32)

    def replace(
        self, last: onnx.NodeProto, source: str, steps: Iterable[Step], made: Values
    ) -> None:
        """Put steps, one after the other, in place of the node whose output they make.

        Args:
            source: what the first step takes.
            made: the steps' own weights; in a step's inputs `:part` stands for made[part].
        """
        self.made |= {f"{last.name}:{part}": array for part, array in made.items()}
        nodes: list[onnx.NodeProto] = []
        for k, (kind, others, attributes) in enumerate(steps):
            inputs = [f"{last.name}{one}" if one.startswith(":") else one for one in others]
            name = f"{last.name}_{k}_{kind}"
            outputs = [f"{name}_{j}" for j in range(3)] if kind == "Split" else [name]
            taken = [*nodes[-1].output] if nodes else [source]
            nodes.append(helper.make_node(kind, [*taken, *inputs], outputs, name, **attributes))
        nodes[-1].output[:] = last.output
        self.replaced[last.name] = nodes

    def done(self) -> onnx.ModelProto:
        """The model with the replacements, without nodes and weights that nothing uses."""
        nodes = [n for node in self.model.graph.node for n in self.replaced.get(node.name, [node])]
        wanted, kept = {one.name for one in self.model.graph.output}, []
        for node in reversed(nodes):
            if wanted & {*node.output}:
                wanted |= {*node.input}
                kept.append(node)
        weights = [one for one in self.model.graph.initializer if one.name in wanted]
        weights += [numpy_helper.from_array(array, name) for name, array in self.made.items()]
        changed = with_content(self.model, weights, kept[::-1])
        if any(node.domain for node in kept):
            changed.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return changed


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all rewrites."""
    for rewrite in (stem_in_blocks, without_transposed, heads_as_products, fused_attention):
        graph = Graph(model)
        rewrite(graph)
        model = graph.done()
    return model


def _spread(rows: int, columns: int, channels: int) -> tuple[list[Step], Values]:
    """Steps from (n, 4 channels, rows, columns) to (n, channels, 2 rows, 2 columns).

    The channels hold the four places under a cell, row by row. Whole pixels move, channels last,
    as the engine keeps them for int8.
    """
    apart = np.array([-1, columns, 2, 2 * channels])  # (n rows, columns, down, right and channel)
    whole = np.array([-1, 2 * rows, 2 * columns, channels])
    reshapes: list[Step] = [("Reshape", [":apart"], {}), ("Reshape", [":whole"], {})]
    return [TO_LAST, reshapes[0], SWAPPED, reshapes[1], TO_FIRST], {"apart": apart, "whole": whole}


def stem_in_blocks(graph: Graph) -> None:
    """A first convolution of 3x3, stride 2 on one channel, as 2x2 on blocks of 4x4 pixels.

    The engine reads one channel byte by byte; 16 it reads at once.
    """
    image = graph.model.graph.input[0].name
    for node in graph.users(image):
        weights = graph.weights.get(node.input[1]) if node.op_type == "Conv" else None
        relu = graph.users(node.output[0])
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        known = given.get("strides") == [2, 2] and given.get("pads") == [1] * 4
        if weights is None or weights.shape[1:] != (1, 3, 3) or not known:
            continue
        if [one.op_type for one in relu] != ["Relu"]:
            continue
        rows, columns = (side // 4 for side in graph.shapes[image][2:])
        outputs = len(weights)
        kernel = np.zeros((2, 2, outputs, 4, 4, 2, 2), np.float32)
        for a, b, y, x in np.ndindex(2, 2, 3, 3):  # place of the output in its block; of the weight
            row, column = 2 * a + y - 1, 2 * b + x - 1
            place = (row % 4, column % 4, 1 + row // 4, 1 + column // 4)
            kernel[(a, b, slice(None), *place)] = weights[:, 0, y, x]
        steps, made = _spread(rows, columns, outputs)
        made |= {
            "lines": np.array([-1, 4, columns, 4]),
            "blocks": np.array([-1, rows, columns, 16]),
            "kernel": kernel.reshape(4 * outputs, 16, 2, 2),
            "bias": np.tile(graph.bias(node, outputs), 4),
        }
        gathered: list[Step] = [
            ("Reshape", [":lines"], {}),
            SWAPPED,
            ("Reshape", [":blocks"], {}),
            TO_FIRST,
            ("Conv", [":kernel", ":bias"], {"pads": [1, 1, 0, 0]}),
            ("Relu", (), {}),
        ]
        graph.replace(relu[0], image, [*gathered, *steps], made)


def without_transposed(graph: Graph) -> None:
    """Transposed convolutions, which have no int8 kernel, as 1x1 ones whose channels are spread.

    One of size and stride 2 lets no two inputs meet in an output, so that each of the four places
    under an input is a 1x1 convolution of its own (Shi et al. 2016, sub-pixel convolution).
    """
    for node in graph.model.graph.node:
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        odd = any((*given.get("pads", ()), *given.get("output_padding", ())))
        if node.op_type != "ConvTranspose" or given.get("strides") != [2, 2] or odd:
            continue
        source, name = node.input[:2]
        kernel = graph.weights[name]  # (inputs, outputs, rows, columns)
        inputs, outputs, *size = kernel.shape
        if size != [2, 2] or given.get("group", 1) != 1:
            continue
        rows, columns = graph.shapes[source][2:]
        steps, made = _spread(rows, columns, outputs)
        made |= {
            "kernel": kernel.transpose(2, 3, 1, 0).reshape(4 * outputs, inputs, 1, 1).copy(),
            "bias": np.tile(graph.bias(node, outputs), 4),
        }
        graph.replace(node, source, [("Conv", [":kernel", ":bias"], {}), *steps], made)


def heads_as_products(graph: Graph) -> None:
    """The heads' 1x1 convolutions as matrix products: of int8 weights, but not of int8 results."""
    for node in graph.model.graph.node:
        if node.op_type == "Conv" and re.match(r"(members\.\d+\.)?head\.", node.input[1]):
            weights = graph.weights[node.input[1]][:, :, 0, 0].T.copy()
            made = {"weights": weights, "bias": graph.bias(node, weights.shape[1])}
            product: list[Step] = [("MatMul", [":weights"], {}), ("Add", [":bias"], {})]
            graph.replace(node, node.input[0], [TO_LAST, *product, TO_FIRST], made)


def fused_attention(graph: Graph) -> None:
    """Plain self-attention as one node of the engine: a softmax and all around it."""
    for node in graph.model.graph.node:
        scores = graph.maker(node.input[0]) if node.op_type == "Softmax" else None
        if scores is None or scores.op_type != "MatMul":
            continue
        first, last = scores, node  # from query, key and value beside each other to the answer
        while first.op_type != "Reshape" and (before := graph.maker(first.input[0])):
            first = before
        while last.op_type != "Reshape":
            last = graph.users(last.output[0])[0]
        _, _, three, heads, width = graph.shapes[first.output[0]]
        made = {"widths": np.full(three, heads * width)}
        steps: list[Step] = [
            ("Split", [":widths"], {"axis": 2}),
            ("MultiHeadAttention", (), {"num_heads": heads, "domain": "com.microsoft"}),
        ]
        graph.replace(last, first.input[0], steps, made)
