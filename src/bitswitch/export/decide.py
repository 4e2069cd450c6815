"""Of a graph whose numbers are known, the branch that is taken in the place of every If."""

from collections import deque
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from bitswitch.export.lowering import remove_dead


def decide(graph: ir.Graph, arrays: Mapping[str, np.ndarray]) -> None:
    """Put the branch that is taken in the place of every If on a constant."""
    pending = deque(graph)
    while pending:
        node = pending.popleft()
        condition = node.inputs[0] if node.op_type == "If" else None
        if condition is None or condition.name is None or condition.name not in arrays:
            continue
        taken, other = (node.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
        if not arrays[condition.name]:
            taken, other = other, taken
        old, (new,) = node.outputs[0], taken.outputs
        taken.outputs.clear()
        for inner in list(taken):
            taken.remove(inner)
            # Names of nodes are a subgraph's own.
            inner.name = inner.outputs[0].name
            graph.insert_before(node, inner)
            pending.append(inner)
        identity = new.producer()
        if identity is not None and identity.op_type == "Identity":
            given = identity.inputs[0]
            assert given is not None
            new = given
            identity.replace_input_with(0, None)
            graph.remove(identity)
        if old.is_graph_output():
            graph.outputs[graph.outputs.index(old)] = new
            old.name, new.name = f"{new.name}.before", old.name
        # Inside a branch of an If nobody says them; of the network's result the file must.
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)
        for inner in ir.traversal.RecursiveGraphIterator(other):
            for index, value in enumerate(inner.inputs):
                inner.replace_input_with(index, None)
                remove_dead(graph, None if value is None or value.graph is not graph else value.producer())
        graph.remove(node, safe=True)
