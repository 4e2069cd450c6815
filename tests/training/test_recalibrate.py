import copy

import pytest
import torch

import bitswitch as bs
from bitswitch.data import load_data
from bitswitch.errors import UserError
from bitswitch.evaluation import training_views
from bitswitch.training.recalibrate import recalibrate


def test_statistics_are_those_of_the_images_at_that_width(quantized, images):
    before = copy.deepcopy(quantized.state_dict())
    bs.switch(quantized, 8)
    quantized.train()
    seen = []
    norm = quantized.bn2.variants["2"]
    handle = norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    recalibrate(quantized, [images[:8], images[8:]], 2)
    handle.remove()
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-5)
    assert torch.allclose(norm.running_var, variances, rtol=1e-4)
    assert norm.momentum == 0.1 and quantized.training and set(bs.widths(quantized).values()) == {8}
    after = quantized.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".variants.2." in name for name in changed)


def test_what_sees_no_images_keeps_its_statistics(quantized, images):
    quantized.aside = torch.nn.BatchNorm2d(3)
    quantized.aside(images)
    before = copy.deepcopy(quantized.state_dict())
    batches = (x for x in [images])
    recalibrate(quantized, batches, 2)
    with pytest.raises(UserError, match="no images"):
        recalibrate(quantized, batches, 8)
    after = quantized.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".variants.2." in name for name in changed)


def test_a_batch_too_small_leaves_all_statistics(images):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4), torch.nn.BatchNorm1d(4))
    network(images)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match="one image is too few"):
        recalibrate(network, [images, images[:1]], None)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network[2].momentum == 0.1


def test_images_are_seen_as_training_sees_them():
    data = load_data("digits", val_fraction=0.1)
    first, last = training_views(data, 300, torch.device("cpu"))
    # Batches count alike, so that none is small.
    assert len(first) == 150 and len(last) == 150
    again = next(data.training_batches(batch_size=150, seed=0, device=torch.device("cpu")).epoch(0))[0]
    assert torch.equal(first, again) and not torch.equal(first[:100], data.sample(100))
    assert [len(x) for x in training_views(data, 20, torch.device("cpu"))] == [20]
    few = load_data("digits", val_fraction=0.9)
    assert [len(x) for x in training_views(few, few.size("train") + 1, torch.device("cpu"))] == [73, 72]


def test_more_images_than_there_are_come_again_augmented_otherwise():
    data = load_data("digits", val_fraction=0.9)
    assert data.size("train") < 256
    views = torch.cat(training_views(data, 600, torch.device("cpu")))
    assert len(views) == 600
    assert len(views.flatten(1).unique(dim=0)) > 1.5 * data.size("train")
