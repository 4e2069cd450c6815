import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.training import (
    AssignmentSampler,
    Distillation,
    Engine,
    FloatObjective,
    JointObjective,
    MultiPrecisionOptimizer,
    ScaleGradients,
    WidthSampler,
)

LABELS = torch.arange(16) % 5


def joint(model, **options):
    return JointObjective(model, MultiPrecisionOptimizer(model), **options)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_against_its_definition(temperature):
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64)
    labels = torch.arange(7) % 5
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.3 * F.cross_entropy(student, labels) + 0.7 * temperature**2 * divergence
    kd = Distillation(teacher="float", temperature=temperature, weight=0.7)
    assert torch.allclose(kd.loss(student, labels, teacher), expected)
    assert torch.equal(kd.loss(student, labels, None), F.cross_entropy(student, labels))


def test_the_float_teacher_teaches_every_width_and_is_left_alone(quantized, network, images):
    before = copy.deepcopy(network.state_dict())
    seen = []
    objective = joint(quantized, distillation=Distillation(teacher="float"), teacher=network)
    objective.distillation = type(
        "Spy", (), {"teacher": "float", "loss": lambda _, s, y, t: (seen.append(t), s.sum())[1]}
    )()
    objective.step(images, LABELS, 1.0)
    with torch.no_grad():
        expected = network(images)
    assert len(seen) == 4 and all(torch.equal(t, expected) for t in seen)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


def test_the_highest_width_teaches_the_others_in_place(quantized, images):
    seen = []
    objective = joint(quantized, distillation=Distillation(teacher="highest"))
    spy = {"teacher": "highest", "loss": lambda _, s, y, t: (seen.append((s.detach(), t)), s.square().sum())[1]}
    objective.distillation = type("Spy", (), spy)()
    objective.step(images, LABELS, 1.0)
    assert seen[0][1] is None
    assert all(torch.equal(teacher, seen[0][0]) for _, teacher in seen[1:])
    assert not any(teacher.requires_grad for _, teacher in seen[1:])


def test_a_teacher_is_given_exactly_where_it_is_asked_for(quantized, network):
    with pytest.raises(ValueError, match="teacher"):
        joint(quantized, teacher=network)
    with pytest.raises(ValueError, match="teacher"):
        joint(quantized, distillation=Distillation(teacher="float"))


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_are_the_whole_batch(quantized, images, parts):
    """Without batch statistics the gradients are those of the whole batch, the LSQ factor of scales too."""
    quantized.double().eval()
    images = images.double()
    found = []
    for micro_batches in (1, parts):
        model, kept = copy.deepcopy(quantized), {}
        objective = joint(model, engine=Engine(micro_batches=micro_batches))
        objective.on_gradients = lambda width, model=model, kept=kept: kept.update(
            {(width, n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        objective.optimizer.step = lambda width, mixed, model=model: model.zero_grad()
        losses = objective.step(images, LABELS, 1.0)
        found.append((losses, kept))
    (one, a), (many, b) = found
    assert torch.allclose(one, many) and a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], rtol=1e-9, atol=1e-12) for key in a)


def test_bfloat16_and_channels_last_train(quantized, images):
    objective = joint(quantized, engine=Engine(precision="bfloat16", channels_last=True))
    losses = [objective.step(images, LABELS, 1.0) for _ in range(8)]
    assert losses[-1].max() < losses[0].min() and losses[0].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in quantized.parameters())
    assert quantized.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_float_training_lowers_the_loss(network, images):
    objective = FloatObjective(network, lr=0.05, momentum=0.9, weight_decay=0, engine=Engine(micro_batches=2))
    losses = [float(objective.step(images, LABELS, 1.0)) for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("form", ["raw", "log"])
def test_scales_and_gradients_are_recorded_by_layer_and_width(network, images, form):
    quantized = bs.quantize(network, example_inputs=images, scale_form=form)
    observed = ScaleGradients(quantized)
    seen = {}

    def both(width):
        observed.add(width)
        layer = quantized.conv2
        scales = layer.weight_quantizer, layer.input_quantizer
        gradients = [scale.selected(width)["scale_parameter"].grad.abs().item() for scale in scales]
        values = [layer.weight_quantizer.scale().item(), layer.input_quantizer.scale(width).item()]
        seen.setdefault(width, []).append([*gradients, *values, layer.weight.grad.norm().item()])

    objective = joint(quantized, on_gradients=both)
    for _ in range(3):
        objective.step(images, LABELS, 1.0)
    rows = {(row["bits"], row["layer"]): row for row in observed.rows()}
    assert set(rows) == {(w, n) for w in (8, 6, 4, 2) for n in bs.widths(quantized)}
    for width, steps in seen.items():
        row, steps = rows[width, "conv2"], np.array(steps)
        moves = np.abs(np.diff(np.log(steps[:, 2:4]), axis=0)).mean(0)
        for i, side in enumerate(("weight", "input")):
            assert row[f"{side}_mean"] == pytest.approx(steps[:, i].mean(), rel=1e-5)
            assert row[f"{side}_max"] == pytest.approx(steps[:, i].max(), rel=1e-6)
            assert row[f"{side}_scale"] == pytest.approx(steps[-1, 2 + i], rel=1e-5)
            assert row[f"{side}_move"] == pytest.approx(moves[i], rel=1e-2) and moves[i] > 1e-5
        assert row["gradient_norm"] == pytest.approx(steps[:, 4].mean(), rel=1e-5)
    assert observed.rows() == []


def test_a_batch_that_micro_batches_cannot_share_is_refused(quantized, images):
    with pytest.raises(ValueError, match="micro_batches=3"):
        joint(quantized, engine=Engine(micro_batches=3)).step(images, LABELS, 1.0)


def test_half_precision_weights_have_float32_scales(network, images):
    model = bs.quantize(network.bfloat16(), example_inputs=images.bfloat16())
    scales = [p for n, p in model.named_parameters() if "scale_parameter" in n]
    assert scales and all(p.dtype == torch.float32 for p in scales)
    F.cross_entropy(model(images.bfloat16()).float(), LABELS).backward()
    assert model.conv2.weight.grad.dtype == torch.bfloat16


class NothingReadOnTheHost(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a tensor's value, its shape by value, a copy elsewhere."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
            torch.ops.aten.is_nonzero,
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"order": "accumulate"}, {"distillation": Distillation(teacher="highest")},
                {"engine": Engine(micro_batches=2)}, {"engine": Engine(precision="bfloat16")}], ids=str
)  # fmt: skip
@pytest.mark.parametrize("alrs", ["relative", "printed", "off"])
def test_a_step_reads_no_tensor_on_the_host(quantized, images, options, alrs):
    objective = JointObjective(quantized, MultiPrecisionOptimizer(quantized, alrs=alrs), **options)
    with NothingReadOnTheHost():
        losses = objective.step(images, LABELS, 1.0)
        with pytest.raises(AssertionError, match="waits for the device"):
            float(losses[0])


def test_a_supernet_step_reads_no_tensor_on_the_host(quantized, images):
    names = tuple(bs.widths(quantized))
    sampler = AssignmentSampler(
        layers=names, widths=(8, 6, 4, 2), sensitive=frozenset(names[:1]), sampling="hasb", sigma=1.0, sandwich=False,
        seed=0, steps=1, epochs=1,
    )  # fmt: skip
    objective = joint(quantized, sampler=sampler)
    with NothingReadOnTheHost():
        objective.step(images, LABELS, 1.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda q: JointObjective(q, bs.MultiPrecisionOptimizer(q), "accumlate"), "did you mean 'accumulate'"),
        (lambda q: Distillation(teacher="hightest"), "did you mean 'highest'"),
        (lambda q: Distillation(temperature=0), "a temperature is above 0"),
        (lambda q: Engine(precision="bf16"), "precision='bf16'"),
        (lambda q: Engine(micro_batches=0), "micro_batches=0"),
        (lambda q: WidthSampler(widths=(8, 4), forwards=3, seed=0), "from 1 to all 2 widths"),
        (
            lambda q: AssignmentSampler(
                layers=("a",), widths=(8,), sensitive=frozenset(), sampling="HASB", sigma=1, sandwich=False, seed=0,
                steps=1, epochs=1,
            ),
            "did you mean 'hasb'|there are hasb",
        ),
    ],
)  # fmt: skip
def test_words_that_are_none_are_told(quantized, make, words):
    with pytest.raises(UserError, match=words):
        make(quantized)
