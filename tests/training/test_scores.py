"""Scores that no evaluation can give."""

import pytest
import torch

from bitswitch.errors import UserError
from bitswitch.training import World, evaluate
from bitswitch.training.evaluate import with_less_at_once


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


def test_where_memory_is_short_fewer_images_are_scored_at_a_time():
    tried = []

    def score(images):
        tried.append(images)
        if images > 64:
            raise torch.OutOfMemoryError("out of memory")
        return images

    cpu = torch.device("cpu")
    assert with_less_at_once(score, 256, cpu, World()) == 64 and tried == [256, 128, 64]
    with pytest.raises(UserError, match="cpu is out of memory when 65 images at a time are scored"):
        with_less_at_once(score, 65, cpu, World(1, 2))
    with pytest.raises(UserError, match="when 1 images"):
        with_less_at_once(lambda _: score(256), 4, cpu, World())


def test_the_class_of_equal_logits_is_one():
    """As of a network whose outputs have collapsed: top-1, predictions and the confusion matrix say the same."""
    for label in (0, 8):
        confusion, predictions = [], []
        batches = [(torch.zeros(8, 10), torch.full((8,), label))]
        (score,) = evaluate(torch.nn.Identity(), batches, [None], confusion=confusion, predictions=predictions)
        assert score.top1 == 100 * float((predictions[0] == label).float().mean())
        assert score.top1 == 100 * float(confusion[0].diag().sum()) / 8 <= score.top5
