"""Rewrites of an exported graph that leave a session fewer small operations: each is a microsecond or two of every run."""

from typing import Any

import onnx_ir as ir
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet
from onnxscript.rewriter.rules.common import materialize_reshape_shape_rule


def simplify(model: ir.Model) -> None:
    """Fold constants, among them the shapes of views that keep the batch; one slice for two, and means that drop their axes."""
    fold_constants(model)
    materialize_reshape_shape_rule.apply_to_model(model)
    RewriteRuleSet([_SliceOfSlice.rule(), _ViewOfMean.rule()]).apply_to_model(model)
    remove_unused_nodes(model)


class _SliceOfSlice(RewriteRuleClassBase):
    """A slice of a slice along other axes is one slice."""

    def pattern(self, op: Any, x: Any) -> Any:
        first = op.Slice(x, _allow_other_inputs=True, _outputs=["first"])
        return op.Slice(first, _allow_other_inputs=True, _outputs=["second"])

    def check(self, context: Any, x: Any, first: Any, second: Any) -> MatchResult:
        self.arguments = [_slice_arguments(value) for value in (first, second)]
        axes = [axis for arguments in self.arguments for axis in arguments[2:3]]
        together = [axis for own in axes for axis in own]
        is_one = len(axes) == 2 and min(together, default=-1) >= 0 and len(set(together)) == len(together)
        return MatchResult() if is_one else MatchResult().fail("not along other axes, or not of constants")

    def rewrite(self, op: Any, x: Any, **_: Any) -> Any:
        return op.Slice(x, *(op.Constant(value_ints=[*a, *b]) for a, b in zip(*self.arguments, strict=True)))


def _slice_arguments(value: ir.Value) -> list[list[int]]:
    """Starts, ends, axes and steps of a slice; nothing where one of them is no constant, or left out."""
    node = value.producer()
    assert node is not None
    found = [None if given is None else ir.convenience.get_const_tensor(given) for given in node.inputs[1:]]
    numbers = [tensor.numpy().tolist() for tensor in found if tensor is not None]
    return numbers if len(numbers) == 4 else []


class _ViewOfMean(RewriteRuleClassBase):
    """A mean that keeps the dimensions it is taken over, with a view without them behind, is a mean that drops them."""

    def pattern(self, op: Any, x: Any, axes: Any, shape: Any) -> Any:
        mean = op.ReduceMean(x, axes, _allow_other_attributes=True, _outputs=["mean"])
        return op.Reshape(mean, shape, _allow_other_attributes=True, _outputs=["view"])

    def check(self, context: Any, x: Any, axes: Any, shape: Any, mean: Any, view: Any) -> MatchResult:
        node, over = mean.producer(), ir.convenience.get_const_tensor(axes)
        if node is None or over is None or x.shape is None or view.shape is None:
            return MatchResult().fail("of unknown axes or shapes")
        rank = len(x.shape)
        gone = {int(axis) % rank for axis in over.numpy()}
        left = [x.shape[axis] for axis in range(rank) if axis not in gone]
        keeps = node.attributes.get_int("keepdims", 1) == 1 and len(gone) > 0
        # One size that is not known follows from the others; two might be shared out otherwise.
        same = left == list(view.shape) and sum(not isinstance(size, int) for size in left) <= 1
        return MatchResult() if keeps and same else MatchResult().fail("another view")

    def rewrite(self, op: Any, x: Any, axes: Any, **_: Any) -> Any:
        return op.ReduceMean(x, axes, keepdims=0)
