"""The CUDA path against the CPU path, where there is a GPU."""

import copy
import json

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

import bitswitch as bs
from bitswitch.nn.one_graph import OneGraph
from bitswitch.numerics import double_round, learned_step, weight_codes
from bitswitch.training import Engine, JointObjective, MultiPrecisionOptimizer
from commands import call

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LABELS = torch.arange(16) % 5
# Bounds, ties, negatives, zeros and what is not a number.
AWKWARD = torch.tensor([0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 128.0, -128.0, -128.5, 1e30, -1e30, torch.nan])


def gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.square().nan_to_num().sum().backward()
    return out.detach().cpu(), [x.grad.cpu() for x in inputs]


@pytest.mark.parametrize("low", [8, 6, 4, 2])
def test_quantizers(low):
    x = torch.cat([AWKWARD, torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 40])
    scale = torch.tensor(1.0)
    finite = x[x.isfinite()]
    assert torch.equal(weight_codes(finite.cuda(), scale.cuda(), 8).cpu(), weight_codes(finite, scale, 8))
    for function in (
        lambda x, s: double_round(x, s, high=8, low=low),
        lambda x, s: learned_step(x, s, bounds=(0, 2**low - 1)),
    ):
        out, (grad_x, _) = gradients(function, x, scale)
        cuda, (cuda_grad_x, _) = gradients(function, x.cuda(), scale.cuda())
        assert torch.equal(cuda.nan_to_num(7), out.nan_to_num(7))
        torch.testing.assert_close(cuda_grad_x, grad_x, equal_nan=True)
        clean = finite.abs() < 1e4
        _, (_, grad_scale) = gradients(function, finite[clean], scale)
        _, (_, cuda_grad_scale) = gradients(function, finite[clean].cuda(), scale.cuda())
        torch.testing.assert_close(cuda_grad_scale, grad_scale, rtol=1e-4, atol=1e-4)


def gradients_of(model, images, wanted, **engine):
    """Logits and gradients at one precision."""
    device = next(model.parameters()).device
    with bs.switched(model, wanted):
        logits = Engine(**engine).forward_of(model)(images.to(device))
        F.cross_entropy(logits, LABELS.to(device)).backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach().cpu(), found


@pytest.mark.parametrize("compiled", [False, True])
def test_logits_and_gradients(quantized, images, compiled):
    quantized, images = quantized.double(), images.double()
    other = copy.deepcopy(quantized).cuda()
    for wanted in (8, 2, {"conv2": 8}):
        logits, found = gradients_of(quantized, images, wanted)
        cuda_logits, cuda_found = gradients_of(other, images, wanted, compile=compiled)
        torch.testing.assert_close(cuda_logits, logits, rtol=1e-9, atol=1e-9)
        assert cuda_found.keys() == found.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(cuda_found[name], gradient, rtol=1e-9, atol=1e-9)


def test_one_graph_for_all_widths(quantized, images):
    torch._dynamo.reset()
    counters.clear()
    model, x = quantized.cuda(), images.cuda()
    forward = OneGraph(model)
    for width in (8, 6, 4, 2):
        with bs.switched(model, width):
            forward(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("engine", [{}, {"precision": "bfloat16"}, {"compile": True}], ids=str)
def test_a_joint_step_does_not_synchronise(quantized, images, engine):
    model, x, y = quantized.cuda(), images.cuda(), LABELS.cuda()
    objective = JointObjective(model, MultiPrecisionOptimizer(model), engine=Engine(**engine))
    objective.step(x, y, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective.step(x, y, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_file_is_the_same(quantized, tmp_path):
    bs.save(quantized, tmp_path / "cpu.safetensors")
    bs.save(copy.deepcopy(quantized).cuda(), tmp_path / "cuda.safetensors")
    assert (tmp_path / "cuda.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()


def test_graphs_of_a_model_on_the_gpu(quantized, images, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = quantized.to("cuda").eval()
    for inputs in (images, images.cuda()):
        bs.save(model, tmp_path / "m.safetensors", example_inputs=inputs)
        bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=inputs)


def test_a_run_of_all_stages(tmp_path, capsys):
    words = ["pretrain.epochs=2", "train.epochs=1", "supernet.epochs=1", "sensitivity.images=64", "search.points=2"]
    out = tmp_path / "run"
    status, *_ = call(capsys, "run", "digits", "--device", "cuda", "--out", out, *words)
    assert status == 0 and (out / "frontier.json").exists()
    status, printed, _ = call(capsys, "evaluate", out / "model.safetensors", "--device", "cpu", "--json")
    assert status == 0 and [row["bits"] for row in json.loads(printed)["results"]] == [8, 6, 4, 2]
