"""Scores that no evaluation can give."""

import pytest
import torch

from bitswitch.errors import UserError
from bitswitch.training import evaluate


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_told(quantized, images, value):
    batches = [(images, torch.arange(len(images)) % 5)]
    assert evaluate(quantized, batches, [8, 2])[1].images == len(images)
    with torch.no_grad():
        quantized.get_parameter(next(iter(dict(quantized.named_parameters())))).fill_(value)
    with pytest.raises(UserError, match="outputs at 8 bits are not finite numbers"):
        evaluate(quantized, batches, [8, 2])
    with pytest.raises(UserError, match="the network's outputs are not finite"):
        evaluate(quantized, batches, [None])


def test_the_class_of_equal_logits_is_one():
    """As of a network whose outputs have collapsed: top-1, predictions and the confusion matrix say the same."""
    for label in (0, 8):
        confusion, predictions = [], []
        batches = [(torch.zeros(8, 10), torch.full((8,), label))]
        (score,) = evaluate(torch.nn.Identity(), batches, [None], confusion=confusion, predictions=predictions)
        assert score.top1 == 100 * float((predictions[0] == label).float().mean())
        assert score.top1 == 100 * float(confusion[0].diag().sum()) / 8 <= score.top5
