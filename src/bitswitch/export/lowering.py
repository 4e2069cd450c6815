"""A float graph on its way to integers: what is open in it, and how its nodes are replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from bitswitch.artifact import Header, tensor_name
from bitswitch.runtime.bindings import Bindings, Constant, Product, Quantizer

_NORM_PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass
class Lowering:
    """A graph on its way to integers, and what it will leave open.

    Attributes:
        model: changed in place.
        header: of the artifact.
        tensors: names of the artifact's tensors.
        products: the layers' products, in the order in which they run, each with the value that it gives.
    """

    model: ir.Model
    header: Header
    tensors: Mapping[str, np.ndarray]
    products: list[tuple[Product, ir.Value]] = field(default_factory=list)
    quantizers: dict[tuple[int, str], tuple[Quantizer, ir.Value]] = field(default_factory=dict)
    _prefixes: dict[str, int] = field(default_factory=dict)

    @property
    def graph(self) -> ir.Graph:
        """The model's."""
        return self.model.graph

    def prefix(self, name: str) -> str:
        """A prefix that no other arrays have."""
        self._prefixes[name] = self._prefixes.get(name, 0) + 1
        return name if self._prefixes[name] == 1 else f"{name}:{self._prefixes[name]}"

    def add(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], *, name: str, **attributes: Any
    ) -> ir.Value:
        """A node of one output, put before another."""
        node = ir.node(op, inputs, attributes or None, outputs=[ir.Value(name=name)])
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def constant(self, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A constant of the graph that a binding names."""
        if name not in self.graph.initializers:
            value = ir.Value(name=name, type=None if dtype is None else ir.TensorType(dtype))
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def fixed(self, name: str, array: np.generic | np.ndarray) -> ir.Value:
        """A constant that is in the graph."""
        value = self.constant(f"bitswitch.{name}")
        value.const_value = ir.tensor(np.asarray(array), name=value.name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        return value

    def whole(self, numbers: Sequence[int]) -> ir.Value:
        """A constant of whole numbers that is in the graph."""
        return self.fixed("_".join(map(str, numbers)), np.asarray(numbers, np.int64))

    def bindings(self, additions: str) -> Bindings:
        """All that the graph leaves open, once it is rewritten; unused inputs that were parameters are dropped."""
        self.graph.sort()
        for name in [
            name for name, value in self.graph.initializers.items() if not (value.uses() or value.is_graph_output())
        ]:
            del self.graph.initializers[name]
        constants = []
        norms = {tensor_name(norm, key): norm for norm in self.header.norms for key in _NORM_PARTS}
        for value in list(self.graph.inputs):
            if value.name in self.tensors or _is_weight(value, self.header):
                self.graph.inputs.remove(value)
                if value.uses() or value.is_graph_output():
                    assert value.name and value.dtype is not None
                    constants.append(
                        Constant(tensor=value.name, dtype=value.dtype.numpy().name, norm=norms.get(value.name))
                    )
                    self.graph.initializers[value.name] = value
        return Bindings(
            additions=additions,
            quantizers=tuple(quantizer for quantizer, _ in self.quantizers.values()),
            products=tuple(
                product if product.into else replace(product, into=self._reader(product, value))
                for product, value in self.products
            ),
            constants=tuple(constants),
        )

    def _reader(self, product: Product, value: ir.Value) -> str | None:
        """The prefix of the quantizer that alone reads the result of a convolution."""
        node = only_user(value)
        if product.kind != "conv" or node is None or node.op_type != "QuantizeLinear":
            return None
        return self.quantizer_of(node)

    def quantizing(self, prefix: str) -> ir.Node:
        """The QuantizeLinear of a quantizer."""
        uses = self.graph.initializers[f"{prefix}.scale"].uses()
        return next(node for node, _ in uses if node.op_type == "QuantizeLinear")

    def quantizer_of(self, node: ir.Node) -> str:
        """The prefix of the quantizer that a QuantizeLinear belongs to."""
        scale = node.inputs[1]
        return next(q.prefix for q, _ in self.quantizers.values() if scale and scale.name == f"{q.prefix}.scale")


@dataclass
class Chain:
    """Nodes that are not in a graph yet."""

    prefix: str
    nodes: list[ir.Node] = field(default_factory=list)

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """A node of one output, behind those that are there."""
        outputs = [ir.Value(name=f"{self.prefix}.{name}")]
        self.nodes.append(ir.node(op, inputs, attributes, outputs=outputs, domain=domain))
        return self.nodes[-1].outputs[0]


def dequantizers(node: ir.Node) -> list[ir.Node]:
    """Those before a convolution: of its input, its weight and its bias."""
    found = [None if value is None else value.producer() for value in node.inputs]
    return [giver for giver in found if giver is not None]


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, if it is just one and the value is no result of the graph."""
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def take_place(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all read `new` where they read `old`; the nodes that only made `old` go."""
    new.shape, new.type = old.shape or new.shape, old.type or new.type
    if old.is_graph_output():
        graph.outputs[:] = [new if value is old else value for value in graph.outputs]
        old.name, new.name = f"{old.name}.before", old.name
    old.replace_all_uses_with(new)
    remove_dead(graph, old.producer())


def remove_dead(graph: ir.Graph, node: ir.Node | None) -> None:
    """Remove a node whose results nobody reads, and those that only made its inputs."""
    if node is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    givers = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for giver in givers:
        remove_dead(graph, giver)


def _is_weight(value: ir.Value, header: Header) -> bool:
    return any(value.name == tensor_name(layer.name, "weight") for layer in header.layers)
