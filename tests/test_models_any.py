import copy
import warnings
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import bitswitch as bs
from bitswitch.nn import QuantizedLayer

WIDTHS = (8, 6, 4, 2)


def small_vit():
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at 0, which would stop every gradient
    return model


# network, image side, layers that are quantized
NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None, num_classes=10), 64, 19),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None, num_classes=10), 64, 51),
    "vit": (small_vit, 32, 8),
}


@pytest.fixture(scope="module", autouse=True)
def quick_starts():
    with pytest.MonkeyPatch.context() as patch:
        # How many numbers a scale is started from: fewer make these large networks affordable here, nothing else.
        patch.setattr("bitswitch.numerics.scales._SAMPLE", 1 << 10, raising=False)
        yield


def images(side, n=8):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def quiet(model, inputs, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return bs.quantize(model, example_inputs=inputs, **options)


def settle(model, x):
    """Running statistics that are those of the data, as in a trained network: scales start from a forward in eval."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    make, side, count = NETWORKS[request.param]
    torch.manual_seed(0)
    model = make()
    x = images(side)
    settle(model, x)
    quantized = quiet(model, x[:2], bits=WIDTHS)
    return quantized, x, count


def test_all_but_the_first_and_last_layer_are_quantized(network):
    model, _, count = network
    assert len(bs.widths(model)) == count
    floats = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and not isinstance(m, QuantizedLayer)]
    assert len(floats) == 2


@torch.no_grad()
def test_every_width_is_finite_and_another(network):
    model, x, _ = network
    model.eval()
    outputs = []
    for width in WIDTHS:
        with bs.switched(model, width):
            outputs.append(model(x[:2]))
    assert all(torch.isfinite(out).all() for out in outputs)
    assert all(not torch.equal(one, other) for one, other in pairwise(outputs))


def test_gradients_reach_every_active_scale_and_no_other(network):
    model, x, _ = network
    model.train()
    for width in (8, 2):
        with bs.switched(model, width):
            F.cross_entropy(model(x), torch.arange(len(x))).backward()
        for name, parameter in model.named_parameters():
            of_inputs = ".input_quantizer." in name
            if of_inputs and name.rpartition(".")[2] != str(width):
                assert parameter.grad is None, name
            elif "quantizer" in name:
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name
                if "scale_parameter" in name:
                    assert parameter.grad.abs().sum() > 0, name
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_ten_steps_lower_the_loss_at_every_width(name):
    """From random weights as they come, with running statistics that have seen nothing."""
    torch.manual_seed(0)
    make, side, _ = NETWORKS[name]
    x = images(side)
    model = quiet(make(), x, bits=WIDTHS).train()
    frozen = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and not isinstance(m, QuantizedLayer)]
    for layer in frozen:
        layer.requires_grad_(False)
    before = [copy.deepcopy(layer.state_dict()) for layer in frozen]
    optimizer = bs.MultiPrecisionOptimizer(model)
    labels = torch.arange(len(x))
    losses = {width: [] for width in WIDTHS}
    for _ in range(10):
        for width in WIDTHS:
            with bs.switched(model, width):
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step(width)
            losses[width].append(loss.item())
    for width, values in losses.items():
        assert values[-1] < values[0], (width, values)
    for layer, state in zip(frozen, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in layer.state_dict().items())


def test_vit_b_16_has_48_encoder_matrices():
    model = torchvision.models.vit_b_16(weights=None, image_size=32)
    quantized = quiet(model, images(32, 1), bits=(2,))
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
    names = ("self_attention.in_proj", "self_attention.out_proj", "mlp.0", "mlp.3")
    assert list(bs.widths(quantized)) == [f"{block}.{name}" for block in blocks for name in names]
