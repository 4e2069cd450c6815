import copy
import functools
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch.codes import narrow
from bitswitch.errors import UserError
from bitswitch.export import graph as graph_module
from bitswitch.export.float_graph import float_twin
from bitswitch.export.onnx import export_file
from bitswitch.runtime import Session, graph_report


class Concatenating(nn.Module):
    """Branches that are concatenated, a depthwise convolution, ReLU6, a convolution read twice, pooling of codes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 6, 1)
        self.right = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.squeeze = nn.Sequential(nn.Conv2d(14, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(2))
        self.norm = nn.BatchNorm2d(10)
        self.once, self.again = nn.Conv2d(10, 10, 1), nn.Conv2d(10, 10, 3, padding=1)
        self.linear = nn.Linear(10, 12)
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        x = self.first(x).relu()
        x = torch.cat([self.left(x).relu(), self.right(x) * 3], 1)
        x = self.norm(self.squeeze(x))
        x = self.once(x) + self.again(x)
        return self.last(self.linear(x.mean((2, 3))).relu())


class Attending(nn.Module):
    """Linear layers over a sequence, attention, and a convolution of one dimension."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.encoder(x).mean(1))


def quantized(network, x):
    torch.manual_seed(0)
    network = network()
    network(x)
    model = bs.quantize(network, example_inputs=x)
    for width in (8, 6, 4, 2):
        with bs.switched(model, width):
            model.train()(x)
    return model.eval()


@pytest.fixture(scope="module")
def concatenating():
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return quantized(Concatenating, x), x


@pytest.fixture(scope="module")
def attending():
    x = torch.randn(32, 7, 6, generator=torch.Generator().manual_seed(0))
    return quantized(Attending, x), x


def run(content, x):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def snr_db(reference, found):
    return 10 * np.log10(np.square(reference).sum() / np.square(found - reference).sum())


def held_against_torch(model, x, path, wanted, floor):
    with bs.switched(model, wanted), torch.no_grad():
        expected = model(x).numpy()
    content = path.read_bytes()
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
    whole = run(content, x)
    assert snr_db(expected, whole) > floor
    # The size of the batch is free.
    for n in (1, 5):
        assert np.allclose(run(content, x[:n]), whole[:n], atol=1e-3 * np.abs(whole).max())


@pytest.mark.parametrize("fixture", ["concatenating", "attending"])
def test_an_artifact_exports_at_any_assignment(tmp_path, request, fixture):
    model, x = request.getfixturevalue(fixture)
    bs.save(model, tmp_path / "a", example_inputs=x)
    layers = list(bs.widths(model))
    for wanted, floor in ((8, 30), (4, 15), (2, 5), ({layers[0]: 2, layers[1]: 4}, 10)):
        assignment = export_file(tmp_path / "a", tmp_path / "m.onnx", wanted=wanted)
        held_against_torch(model, x, tmp_path / "m.onnx", assignment.to_json(), floor)
        proto = onnx.load(tmp_path / "m.onnx")
        # Standard operations alone, and none whose result nobody reads.
        assert {opset.domain for opset in proto.opset_import} == {""}
        read = {name for node in proto.graph.node for name in node.input} | {out.name for out in proto.graph.output}
        assert all(node.op_type != "If" and read & set(node.output) for node in proto.graph.node)
        report = graph_report(tmp_path / "a", wanted)
        assert report["integer"] == report["layers"] == len(layers)
        session = Session(tmp_path / "a", assignment=assignment.to_json())
        assert np.allclose(session.run(x.numpy()), run((tmp_path / "m.onnx").read_bytes(), x), atol=1e-4)


def test_a_model_exports_as_it_stands(tmp_path, concatenating):
    model, x = concatenating
    with bs.switched(model, 4):
        bs.export_onnx(model, tmp_path / "four.onnx", example_inputs=x, additions="exact")
    held_against_torch(model, x, tmp_path / "four.onnx", 4, 25)
    assert set(bs.widths(model).values()) == {8}
    proto = onnx.load(tmp_path / "four.onnx")
    clips = [node for node in proto.graph.node if node.op_type == "Clip" and node.output[0].endswith(".clipped")]
    quantizers = {node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    assert clips and {node.input[0] for node in clips} <= quantizers
    assert not [node for node in proto.graph.node if node.op_type in ("If", "ConvInteger")]


@pytest.mark.parametrize("additions", ["requantized", "exact"])
@pytest.mark.parametrize("weights", ["int4", "int2"])
def test_packed_weights(tmp_path, concatenating, weights, additions):
    model, x = concatenating
    bits = {"int4": 4, "int2": 2}[weights]
    mixed = dict.fromkeys(bs.widths(model), 8) | dict.fromkeys(list(bs.widths(model))[1:3], bits)
    with bs.switched(model, mixed):
        bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x, weights=weights, additions=additions)
    held_against_torch(model, x, tmp_path / "m.onnx", mixed, 20)
    proto = onnx.load(tmp_path / "m.onnx")
    packed = {"int4": onnx.TensorProto.INT4, "int2": onnx.TensorProto.INT2}[weights]
    codes = {t.name: t for t in proto.graph.initializer if t.name.endswith(".codes")}
    assert sorted(t.data_type == packed for t in codes.values()) == [False] * (len(codes) - 2) + [True] * 2
    for name, tensor in codes.items():
        if tensor.data_type == packed:
            found = onnx.numpy_helper.to_array(tensor).astype(np.int8)
            layer = model.get_submodule(name.removesuffix(".product.codes"))
            assert np.array_equal(found, narrow(layer.stored_codes().numpy(), 8, bits))


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(("weights", "bits"), [("int4", 4), ("int2", 2)])
def test_packed_weights_lose_nothing_to_bytes_of_branches(tmp_path, weights, bits, from_file):
    """They are computed in floats: a branch that ends in 8 bits would be no faster."""
    model = bs.load("resnet20-cifar10")
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    bs.switch(model, bits)
    if from_file:
        bs.save(model, tmp_path / "a", example_inputs=x)
        export_file(tmp_path / "a", tmp_path / "m.onnx", wanted=bits, weights=weights)
    else:
        bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x, weights=weights)
    held_against_torch(model, x, tmp_path / "m.onnx", bits, 30)


class Aliased(nn.Module):
    """A batch normalization and a layer that the network holds in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.mid, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 4, 3)
        self.norm = nn.BatchNorm2d(8)
        self.again = nn.ModuleList([self.norm, self.mid, self.last])

    def forward(self, x):
        return self.last(self.norm(self.mid(self.first(x).relu())).relu()).mean((2, 3))


def test_what_a_network_holds_twice_is_what_the_artifact_holds(tmp_path):
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = quantized(Aliased, x)
    for i, variant in enumerate(model.norm.variants.values()):
        nn.init.normal_(variant.weight, 1, 0.5, generator=torch.Generator().manual_seed(i))
        nn.init.normal_(variant.bias, generator=torch.Generator().manual_seed(i))
    bs.save(model, tmp_path / "a", example_inputs=x, additions="exact")
    for width in (8, 4, 2):
        with bs.switched(model, width), torch.no_grad():
            expected = model(x).numpy()
        assert snr_db(expected, Session(tmp_path / "a", bits=width).run(x.numpy())) > 60, width


class OfRows(nn.Module):
    """Batch normalization of dimension 1 behind matrix products whose channels are dimension 2."""

    def __init__(self, features):
        super().__init__()
        self.first, self.mid, self.last = nn.Linear(6, 6), nn.Linear(6, features), nn.Linear(features, 3)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.last(self.norm(self.mid(self.first(x))).relu()).mean(1)


@pytest.mark.parametrize("features", [6, 5])
def test_a_batch_normalization_of_other_channels_is_not_folded(tmp_path, features):
    x = torch.randn(16, 6, 6, generator=torch.Generator().manual_seed(0))
    model = quantized(functools.partial(OfRows, features), x)
    for variant in model.norm.variants.values():
        variant.running_var.copy_(torch.tensor([0.7, 0.8, 0.9, 1.1, 1.2, 1.4]))
    bs.save(model, tmp_path / "a", example_inputs=x)
    for width in (8, 4):
        with bs.switched(model, width), torch.no_grad():
            expected = model(x).numpy()
        assert snr_db(expected, Session(tmp_path / "a", bits=width).run(x.numpy())) > 60, width


class Answering(Aliased):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(super().forward(x))


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: {"out": y},
        lambda y: ((y, y + 1), y.mean(1)),
        lambda y: [[y]],
        lambda y: (y, torch.ones(3)),
        lambda y: (y, torch.fft.rfft(y)),
    ],
    ids=["dict", "nested", "lists", "constant", "complex"],
)
def test_results_in_any_structure(tmp_path, answer):
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = quantized(functools.partial(Answering, answer), x)
    bs.save(model, tmp_path / "a", example_inputs=x)
    with torch.no_grad():
        expected = Aliased.forward(model, x).numpy()
    found = Session(tmp_path / "a").run(x.numpy())
    assert snr_db(expected, found[0] if isinstance(found, tuple) else found) > 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_graph_of_half_precision_is_refused(tmp_path, concatenating, dtype):
    model, x = copy.deepcopy(concatenating[0]).to(dtype), concatenating[1].to(dtype)
    with pytest.raises(UserError, match=f"{dtype}: a graph is float32"):
        bs.save(model, tmp_path / "a", example_inputs=x)
    bs.save(model.float(), tmp_path / "a", example_inputs=x.float())


def test_a_compiled_model_exports(tmp_path, concatenating):
    model, x = concatenating
    bs.export_onnx(torch.compile(model, backend="eager"), tmp_path / "m.onnx", example_inputs=x)
    held_against_torch(model, x, tmp_path / "m.onnx", 8, 30)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.last = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.first = nn.Linear(8, 8)

    def forward(self, tokens):
        return self.last(self.mid(self.first(self.embed(tokens)).relu()).relu()).mean(1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_file_of_a_network_of_tokens_is_held_against_it(tmp_path, dtype):
    x = torch.randint(0, 20, (32, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    model = quantized(Tokens, x)
    bs.save(model, tmp_path / "a", example_inputs=x)
    export_file(tmp_path / "a", tmp_path / "m.onnx", wanted=8, model=model)
    held_against_torch(model, x, tmp_path / "m.onnx", 8, 30)
    with torch.no_grad():
        model.last.bias += 1
    with pytest.raises(UserError, match="does not compute what the model does"):
        export_file(tmp_path / "a", tmp_path / "other.onnx", wanted=8, model=model)


class Classes(nn.Sequential):
    def forward(self, x):
        return {"classes": super().forward(x).argmax(1), "images": x.shape[0]}


def test_a_network_of_classes_alone_is_held_against_them(tmp_path):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    model = bs.quantize(Classes(*layers).eval(), bits=(8, 2), example_inputs=x)
    bs.save(model, tmp_path / "a", example_inputs=x)
    export_file(tmp_path / "a", tmp_path / "m.onnx", wanted=8, model=model, example_inputs=x)
    with torch.no_grad():
        # Of three in ten images another.
        most = int(model(x)["classes"].bincount().argmax())
        logits = nn.Sequential.forward(model, x)
        behind = (logits.max(1).values - logits[:, most])[logits.argmax(1) != most]
        model[4].bias[most] += behind.quantile(min(1.0, 0.3 * len(x) / len(behind)))
    with pytest.raises(UserError, match="does not compute what the model does"):
        export_file(tmp_path / "a", tmp_path / "other.onnx", wanted=8, model=model, example_inputs=x)
    assert not (tmp_path / "other.onnx").exists()


def test_the_first_result_may_be_one_number(tmp_path):
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = quantized(functools.partial(Answering, lambda y: (y.square().mean(), y)), x)
    bs.save(model, tmp_path / "a", example_inputs=x)
    with torch.no_grad():
        assert np.allclose(Session(tmp_path / "a").run(x.numpy())[0], model(x)[0].numpy(), rtol=0.05)


class Heads(nn.Module):
    """Results of convolutions, channels last as detectors have them, and one of them twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body, self.head, self.other = (nn.Conv2d(8, n, 3, padding=1) for n in (8, 4, 6))
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.body(self.first(x).relu()).relu()
        found, other = self.head(x), self.other(x)
        return found.permute(0, 2, 3, 1), other, found, found, self.last(other)


@pytest.mark.parametrize("additions", ["requantized", "exact"])
def test_results_of_convolutions_may_be_results_of_the_network(tmp_path, additions):
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = quantized(Heads, x)
    bs.save(model, tmp_path / "a", example_inputs=x, additions=additions)
    for width in (8, 6, 4, 2):
        export_file(tmp_path / "a", tmp_path / "m.onnx", wanted=width)
        with bs.switched(model, width), torch.no_grad():
            expected = [y.numpy() for y in model(x)]
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
        for results in (session.run(None, {"x": x.numpy()}), Session(tmp_path / "a", bits=width).run(x.numpy())):
            assert len(results) == 5
            for found, y in zip(results, expected, strict=True):
                assert found.shape == y.shape and snr_db(y, found) > 25, width


@pytest.mark.parametrize("size", [32, 64, 100])
def test_the_range_of_a_branch_is_that_of_all_its_pixels(size):
    """Though many results are looked at in part, and their borders are quieter than what lies inside."""
    result = np.random.default_rng(0).normal(size=(128, 2**22 // (128 * size), size, 2)).astype(np.float32)
    result[:, :, :, 0] *= 0.01
    low, high, loss = graph_module._common_range(result)
    assert 3 < -low < 7 and 3 < high < 7
    step = (high - low) / 255
    assert 0.8 < loss / (step / 12**0.5) < 1.5


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, concatenating, monkeypatch):
    model, x = concatenating
    arrays = graph_module.IntegerGraph.arrays

    def wrong(self, assignment, **options):
        found = arrays(self, assignment, **options)
        return {name: -array if name.endswith("squeeze.0.product.scale") else array for name, array in found.items()}

    monkeypatch.setattr(graph_module.IntegerGraph, "arrays", wrong)
    (tmp_path / "m.onnx").write_bytes(b"before")
    with pytest.raises(UserError, match="does not compute"):
        bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert (tmp_path / "m.onnx").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


class Recurrent(nn.Module):
    """Torch warns of the weights of its recurrent layer when they are exported, and of an axis that two inputs share."""

    def __init__(self):
        super().__init__()
        self.first, self.gru, self.mid, self.last = nn.Linear(6, 8), nn.GRU(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, y):
        return self.last(self.mid(self.gru(self.first(x + y))[0]).relu())


def test_torchs_own_warnings_are_not_the_users(tmp_path):
    x = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))
    model = bs.quantize(Recurrent().eval(), bits=(8, 4), example_inputs=(x, x), keep=("gru",)).eval()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        bs.save(model, tmp_path / "a", example_inputs=(x, x))
    assert not [str(warning.message) for warning in found]


def test_every_result_is_held_against_the_model(tmp_path, monkeypatch):
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = quantized(functools.partial(Answering, lambda y: {"label": y.argmax(1), "first": y + 1, "second": y}), x)
    bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    run = graph_module.Executable.run
    monkeypatch.setattr(
        graph_module.Executable, "run", lambda self, inputs: [*run(self, inputs)[:-1], -run(self, inputs)[-1]]
    )
    with pytest.raises(UserError, match="does not compute"):
        bs.export_onnx(model, tmp_path / "n.onnx", example_inputs=x)


@pytest.mark.parametrize("from_file", [False, True])
def test_it_is_held_against_the_model_at_the_widths_that_are_exported(tmp_path, concatenating, monkeypatch, from_file):
    model, x = concatenating
    bs.save(model, tmp_path / "a", example_inputs=x)
    arrays = graph_module.IntegerGraph.arrays

    def wrong(self, assignment, **options):
        found = arrays(self, assignment, **options)
        name = "squeeze.0.product.sum_scale"
        # Where ranges are looked for, there are no such sums yet.
        return found | ({name: -found[name]} if assignment["squeeze.0"] == 4 and name in found else {})

    monkeypatch.setattr(graph_module.IntegerGraph, "arrays", wrong)
    for wanted in (8, 4):
        out = tmp_path / f"{wanted}.onnx"
        with bs.switched(model, wanted):
            if from_file:
                export = functools.partial(export_file, tmp_path / "a", out, wanted=wanted, model=model)
            else:
                export = functools.partial(bs.export_onnx, model, out, example_inputs=x)
            if wanted == 8:
                export()
            else:
                with pytest.raises(UserError, match="does not compute what the model does at 4 bits"):
                    export()
        assert out.exists() == (wanted == 8)


def test_a_network_that_magnifies_what_disturbs_it_exports_all_the_same(tmp_path, concatenating, monkeypatch):
    model, x = concatenating
    # As where results do not differ from input to input by more than what rounds the other way.
    monkeypatch.setattr(graph_module, "_GREATEST_NOISE", 0.0)
    monkeypatch.setattr(graph_module, "_ROUNDING", 0.0)
    bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x, additions="exact")
    monkeypatch.setattr(graph_module, "_GREATEST_OWN_NOISE", 0.0)
    with pytest.raises(UserError, match="does not compute"):
        bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x, additions="exact")


def test_the_model_is_not_changed(attending):
    model, _ = attending
    before = copy.deepcopy(model.state_dict())
    float_twin(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "there are int8, int4, int2"),
        ({"additions": "exactly"}, "did you mean 'exact'"),
        ({"example_inputs": ()}, "first must be a tensor"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, attending, options, message):
    model, x = attending
    with pytest.raises(UserError, match=message):
        bs.export_onnx(model, tmp_path / "m.onnx", **{"example_inputs": x} | options)


def test_a_network_that_torch_cannot_export_is_named(tmp_path):
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.b(self.a(x))
            return self.c(x if float(x.sum()) > 0 else -x)

    x = torch.randn(8, 4)
    model = bs.quantize(Deciding(), example_inputs=x).eval()
    with pytest.raises(UserError, match="cannot export this Deciding: Could not guard on data-dependent expression"):
        bs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x)


def test_a_file_without_a_graph(tmp_path, attending):
    bs.save(attending[0], tmp_path / "a")
    with pytest.raises(UserError, match="holds no graph"):
        export_file(tmp_path / "a", tmp_path / "m.onnx")
