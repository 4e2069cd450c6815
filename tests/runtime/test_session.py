import copy
import dataclasses
import itertools
import json
import random
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch import artifact
from bitswitch.errors import UserError
from bitswitch.export.onnx import export_file
from bitswitch.nn import make_transitional
from bitswitch.nn.switch import quantized_layers
from bitswitch.runtime import Session, executable, graph_report, source
from bitswitch.runtime.packing import packed, unpacked
from bitswitch.runtime.source import read
from mutate import _edit

WIDTHS = (8, 6, 4, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory, small):
    """(quantized model, images, {additions: artifact}); its norms differ from width to width, one has closed channels."""
    model, images = small
    folder = tmp_path_factory.mktemp("artifacts")
    files = {additions: folder / additions for additions in ("requantized", "exact")}
    for additions, path in files.items():
        bs.save(model, path, example_inputs=images, additions=additions)
    return model, images, files


def snr_db(reference, found):
    return 10 * np.log10(np.square(reference).sum() / np.square(found - reference).sum())


def torch_logits(model, images, wanted):
    with bs.switched(model, wanted), torch.no_grad():
        return model(images).numpy()


@pytest.mark.parametrize("additions", ["requantized", "exact"])
def test_logits_are_torchs(made, additions):
    model, images, files = made
    session = Session(files[additions])
    for width in WIDTHS:
        session.switch(width)
        # Sums are exact, and codes torch's; bytes of branches are not.
        floor = {"exact": 65, "requantized": {8: 30, 6: 20}.get(width, 35)}[additions]
        assert snr_db(torch_logits(model, images, width), session.run(images.numpy())) > floor


def test_a_mixed_assignment_runs(made):
    model, images, files = made
    mixed = {"conv2": 8, "conv3": 2, "conv4": 4}
    session = Session(files["exact"], assignment=mixed)
    assert session.bits is None and session.assignment.to_json() == mixed
    assert snr_db(torch_logits(model, images, mixed), session.run(images.numpy())) > 20
    session.switch({"conv3": 8})
    assert session.assignment.to_json() == mixed | {"conv3": 8}


def test_a_budget_of_a_file_that_is_cut_off_takes_what_it_serves(made):
    whole = read(made[2]["requantized"])
    layers = [layer.name for layer in whole.header.layers]
    rows = tuple(
        {
            "assignment": dict.fromkeys(layers, width),
            "cost": {"bits": float(width)},
            "damage": 8.0 - width,
            "top1": None,
        }
        for width in WIDTHS
    )
    given = dataclasses.replace(whole, header=dataclasses.replace(whole.header, frontier=rows))
    assert given.assignment("avg<=7").uniform == 6 and given.assignment("avg<=8").uniform == 8
    assert dataclasses.replace(given, widths=(4, 2)).assignment("avg<=8").uniform == 4


def test_a_file_that_is_cut_off_runs_at_the_widths_that_it_holds(made, tmp_path):
    _, images, files = made
    whole, path = files["requantized"].read_bytes(), tmp_path / "cut"
    session = Session(files["requantized"])
    layers = artifact.read_header(files["requantized"]).layers
    plane = artifact.plane_bytes([layer.shape for layer in layers])
    for planes, widths in ((7, (6, 4, 2)), (6, (4, 2)), (4, (2,)), (3, (2,))):
        path.write_bytes(whole[: len(whole) - (8 - planes) * plane + plane // 2 * (planes != 3)])
        cut = Session(path)
        assert cut.widths == widths and cut.bits == widths[0]
        for width in widths:
            cut.switch(width)
            session.switch(width)
            assert np.array_equal(cut.run(images.numpy()), session.run(images.numpy()))
        for refused in (8, {layers[0].name: 8}):
            with pytest.raises(UserError, match=f"cut off before 8 bits: it serves {widths[0]} bits at most"):
                cut.switch(refused)
        assert cut.bits == widths[-1]
        with pytest.raises(UserError, match="cut off before 8 bits"):
            Session(path, bits=8)
        for wrong in (5, None):
            with pytest.raises(UserError, match=f"no width {wrong}; it has 8, 6, 4, 2"):
                cut.switch(wrong)
        assert graph_report(path) == graph_report(path, widths[0])
    path.write_bytes(whole[: len(whole) - 5 * plane - 1])
    with pytest.raises(UserError, match="it serves no width; fetch the rest"):
        Session(path)


def test_norms_of_pairs_are_those_of_the_pair(small, tmp_path):
    model, images = copy.deepcopy(small[0]), small[1]
    make_transitional(model).train()
    draw = np.random.default_rng(0)
    layers = list(bs.widths(model))
    # Every pair gets statistics and parameters of its own.
    for norm in (model.bn1, model.bn2, model.bn3):
        for variant in norm.variants.values():
            torch.nn.init.uniform_(variant.weight, 0.5, 2.0)
            torch.nn.init.uniform_(variant.running_mean, -0.5, 0.5)
    bs.save(model.eval(), tmp_path / "m", example_inputs=images, additions="exact")
    session = Session(tmp_path / "m")
    for _ in range(6):
        wanted = dict(zip(layers, draw.choice([8, 6, 4], len(layers)).tolist(), strict=True))
        session.switch(wanted)
        assert snr_db(torch_logits(model, images, wanted), session.run(images.numpy())) > 25


def test_the_batch_is_free(made):
    _, images, files = made
    session = Session(files["requantized"], bits=4)
    whole = session.run(images.numpy())
    for n in (1, 3):
        # The float end of a matrix product rounds a row otherwise where it stands elsewhere among the rows.
        assert np.allclose(session.run(images[:n].numpy()), whole[:n], rtol=0, atol=1e-6 * np.abs(whole).max())


def reference_codes(source, assignment, images):
    """(model with every code as an output, its own codes by ONNX's NumPy interpreter)."""
    from bitswitch.export.graph import IntegerGraph
    from bitswitch.export.onnx import _file, ir

    model = ir.serde.deserialize_model(onnx.load_model_from_string(source.graph))
    graph = IntegerGraph(model, source.bindings, source.header, source.tensors)
    proto = onnx.load_model_from_string(_file(graph, assignment, "int8"))
    names = [node.output[0] for node in proto.graph.node if node.op_type in ("QuantizeLinear", "ConvInteger")]
    kinds = [node.op_type for node in proto.graph.node if node.op_type in ("QuantizeLinear", "ConvInteger")]
    del proto.graph.output[:]
    for name, kind in zip(names, kinds, strict=True):
        dtype = onnx.TensorProto.UINT8 if kind == "QuantizeLinear" else onnx.TensorProto.INT32
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    from onnx.reference import ReferenceEvaluator

    return proto, ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: images})


@pytest.mark.parametrize("additions", ["requantized", "exact"])
@pytest.mark.parametrize("width", [8, 4, 2])
def test_codes_are_those_of_a_numpy_interpreter(made, additions, width):
    from bitswitch.runtime.executable import Executable

    _, images, files = made
    source = read(files[additions])
    assignment = dict.fromkeys(("conv2", "conv3", "conv4"), width)
    proto, expected = reference_codes(source, assignment, images.numpy())
    found = Executable(proto.SerializeToString(), {}).run([images.numpy()])
    assert len(found) >= 3
    differences = np.concatenate(
        [np.abs(a.astype(int) - b.astype(int)).ravel() for a, b in zip(found, expected, strict=True)]
    )
    assert differences.max() <= 1 and (differences != 0).mean() <= 1e-3


def test_every_convolution_runs_in_integers_at_every_width(made):
    _, _, files = made
    for path in files.values():
        for wanted in (*WIDTHS, {"conv2": 8, "conv3": 4, "conv4": 2}):
            report = graph_report(path, wanted)
            assert report["layers"] == report["integer"] == 3
            # The first and the last layer.
            assert report["float"] == 2
    assert graph_report(files["exact"])["additions"] == "exact"
    assert "Clip" not in graph_report(files["requantized"], 8)["operations"]
    assert graph_report(files["requantized"], 4)["operations"]["Clip"] >= 2


def test_branches_are_bytes_beside_codes_of_eight_bits_and_where_every_sum_has_one(made):
    _, _, files = made
    for wanted, products in ((8, 0), (6, 1), (4, 1), (2, 0), ({"conv2": 8, "conv3": 8, "conv4": 6}, 1)):
        operations = graph_report(files["requantized"], wanted)["operations"]
        # conv2 feeds an addition and conv4 a mean; conv3 has groups.
        assert operations.get("MatMulIntegerToFloat", 0) == 2 * products, wanted
        assert operations.get("DequantizeLinear", 0) == 2 - 2 * products


class Residual(nn.Module):
    """Two blocks whose additions are read twice, behind a first stage that is float."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x).relu()
        for i in (0, 2):
            y = self.norms[i](self.convs[i](x)).relu()
            x = (x + self.norms[i + 1](self.convs[i + 1](y))).relu()
        return self.last(x.mean((2, 3)).view(x.shape[0], -1))


def test_a_residual_network_stands_channels_last_between_its_first_layer_and_its_last(tmp_path):
    """So that ONNX Runtime transposes nothing inside: its convolutions of bytes, and patches, have channels last."""
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16)
    network = Residual()
    network(images)
    model = bs.quantize(network, example_inputs=images)
    for width in WIDTHS:
        with bs.switched(model, width):
            model.train()(images)
    bs.save(model.eval(), tmp_path / "m.safetensors", example_inputs=images)
    for width, clips in ((8, 0), (6, 2), (4, 2)):
        operations = graph_report(tmp_path / "m.safetensors", width)["operations"]
        # Behind the first layer, and behind the mean.
        assert operations.get("Transpose", 0) <= 2, (width, operations)
        # The batch of a view is not asked for at every run.
        assert "Shape" not in operations
        # Of what a convolution gives; a sum that is never negative is clipped by its bytes.
        assert operations.get("Clip", 0) == clips
    session = Session(tmp_path / "m.safetensors")
    for width, floor in ((8, 35), (6, 25), (4, 40), (2, 40)):
        session.switch(width)
        assert snr_db(torch_logits(model, images, width), session.run(images.numpy())) > floor, width


class Windows(nn.Module):
    """Convolutions whose windows leave out, overlap and reach beyond the image."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.far = nn.Conv2d(6, 5, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 1))
        self.one = nn.Conv2d(5, 6, 1, stride=2)
        self.even = nn.Conv2d(6, 4, 2, padding=1)
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        x = self.one(self.far(self.first(x).relu()).relu())
        return self.last(self.even(x.relu()).mean((2, 3)))


def test_whole_biases_stand_where_they_move_few_codes(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 17, 22)
    model = bs.quantize(Windows(), bits=(8, 6, 4, 2), example_inputs=images).eval()
    bs.save(model, tmp_path / "m.safetensors", example_inputs=images)
    # far is read by one, one by even; even feeds a mean. Between other widths, the reader's counts.
    mixed = {"far": 2, "one": 6, "even": 4}
    for wanted, sums in ((8, 0), (6, 1), (4, 1), (2, 0), (mixed, 2), ({"far": 8, "one": 8, "even": 6}, 3)):
        operations = graph_report(tmp_path / "m.safetensors", wanted)["operations"]
        found = [operations.get(name, 0) for name in ("MatMulIntegerToFloat", "QLinearConv")]
        assert found == [sums, 3 - sums], wanted
    for width, floor in ((6, 30), (4, 100), (2, 100)):
        session = Session(tmp_path / "m.safetensors", bits=width)
        assert snr_db(torch_logits(model, images, width), session.run(images.numpy())) > floor, width


def test_patches_of_any_window(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 17, 22)
    model = bs.quantize(Windows(), example_inputs=images).eval()
    bs.save(model, tmp_path / "a", example_inputs=images, additions="exact")
    session = Session(tmp_path / "a")
    assert graph_report(tmp_path / "a")["operations"]["MatMulIntegerToFloat"] == 3
    for width in WIDTHS:
        session.switch(width)
        assert snr_db(torch_logits(model, images, width), session.run(images.numpy())) > 100


def test_sums_are_exact_where_products_must_not_saturate(made, monkeypatch):
    """ONNX Runtime then makes unsigned weights of signed ones, all over the graph."""
    monkeypatch.setattr(executable, "_must_be_precise", lambda may_saturate: True)
    test_logits_are_torchs(made, "exact")
    test_logits_are_torchs(made, "requantized")


def test_where_products_may_saturate_a_clip_stands_for_a_byte_s_own(made, monkeypatch):
    """The same codes, and so the same answers to the last bit, on machines of both kinds."""
    _, images, files = made
    for path, width in itertools.product(files.values(), WIDTHS):
        answers, clips = [], []
        for exact in (True, False):
            monkeypatch.setattr(source, "adds_exactly", lambda exact=exact: exact)
            answers.append(Session(path, bits=width).run(images.numpy()))
            clips.append(graph_report(path, width)["operations"].get("Clip", 0))
        assert np.array_equal(*answers)
        # What conv2 reads is never negative; what conv3 reads may be.
        assert clips[1] - clips[0] == (width < 8)


def test_weights_are_narrowed_from_the_stored_codes(made):
    model, _, files = made
    source = read(files["exact"])
    for width in WIDTHS:
        arrays = source.arrays(dict.fromkeys(source.header.checksums and ("conv2", "conv3", "conv4"), width))
        # conv4 has no batch normalization behind it: its scale is the weight's alone.
        dequantized = arrays["conv4.product.codes"].astype(np.int64)
        scale = arrays["conv4.product.sum_scale"].reshape(-1, 1, 1, 1)
        expected = quantized_layers(model)["conv4"].weight_at(width).detach().numpy()
        assert np.allclose(dequantized * scale, expected, rtol=1e-6, atol=0)


def test_inputs_of_another_byte_order(made):
    _, images, files = made
    session, x = Session(files["exact"]), images.numpy()
    assert np.array_equal(session.run(x.astype(">f4")), session.run(x))


def test_what_is_no_width_and_no_input_is_told_in_a_line(made):
    _, images, files = made
    session = Session(files["exact"])
    with pytest.raises(UserError, match=r"no width \[4, 2\]; it has 8"):
        session.switch([4, 2])
    with pytest.raises(UserError, match=r"no width array\(\[4, 2\]\); it has 8"):
        session.switch(np.array([4, 2]))
    for name, number in (("threads", -1), ("threads", "2"), ("threads", 1.5), ("threads", 10**6), ("memory", None)):
        with pytest.raises(UserError, match=f"{name}={number!r}: give a (whole )?number"):
            Session(files["exact"], **{name: number})
    assert Session(files["exact"], threads=np.int64(1), memory=float("inf")).bits == 8
    for dtype in ("complex64", "datetime64[s]"):
        with pytest.raises(UserError, match="cannot run the network on these inputs"):
            session.run(images.numpy().astype(dtype))
    assert session.bits == 8


@pytest.mark.parametrize("place", ["graph", "branch", "name", "no text"])
def test_a_graph_that_wants_a_file_of_this_machine_is_refused(made, tmp_path, monkeypatch, place):
    """As a forged artifact might: a constant of it would be read from a file and come out as a result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_bytes(b"a secret that is not the artifact's")
    header, tensors = artifact.read(made[2]["exact"])
    proto = onnx.load_model_from_string(unpacked(tensors[artifact.GRAPH]))
    secret = onnx.TensorProto(name="leak", data_type=onnx.TensorProto.UINT8, dims=[20], data_location=1)
    for key, value in (("location", "secret.txt"), ("offset", "0"), ("length", "20")):
        secret.external_data.add(key=key, value=value)
    leaked = onnx.helper.make_tensor_value_info("leaked", onnx.TensorProto.UINT8, [20])
    if place == "branch":
        inner = onnx.helper.make_node("Identity", ["leak"], ["inner"])
        result = onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.UINT8, [20])
        branch = onnx.helper.make_graph([inner], "b", [], [result], [secret])
        proto.graph.initializer.append(onnx.helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True]))
        node = onnx.helper.make_node("If", ["yes"], ["leaked"], then_branch=branch, else_branch=branch)
    else:
        proto.graph.initializer.append(secret)
        node = onnx.helper.make_node("Identity", ["leak"], ["leaked"])
    proto.graph.node.append(node)
    proto.graph.output.append(leaked)
    if place == "name":
        # Of a constant that the session supplies, once more.
        secret.name = node.input[0] = proto.graph.initializer[0].name
        proto.graph.initializer[-1].CopyFrom(secret)
    content = proto.SerializeToString()
    if place == "no text":
        # A name that is supplied, and one of other bytes that reads as the same where what is no text is replaced.
        bindings = json.loads(next(entry.value for entry in proto.metadata_props if entry.key == executable.KEY))
        prefix = bindings["quantizers"][0]["prefix"]
        secret.name = node.input[0] = "?" * len(f"{prefix}.scale")
        proto.graph.initializer[-1].CopyFrom(secret)
        proto.graph.node[-1].CopyFrom(node)
        content = proto.SerializeToString()
        for old, start, end in ((secret.name, b"\xf0\x9f\x98", b".scale"), (prefix, "\ufffd".encode(), b"")):
            content = content.replace(old.encode(), start + b"x" * (len(prefix) - 3) + end)
    artifact.write(tmp_path / "forged", header, tensors | {artifact.GRAPH: packed(content)})
    for use in (Session, lambda path: export_file(path, tmp_path / "out.onnx")):
        with pytest.raises(UserError, match="cannot be used"):
            use(tmp_path / "forged")
    assert not (tmp_path / "out.onnx").exists()


def test_the_names_of_all_constants_are_known_before_they_are_computed(made):
    for path in made[2].values():
        source = read(path)
        for width in WIDTHS:
            assert source.bindings.names() == source.arrays(dict.fromkeys(("conv2", "conv3", "conv4"), width)).keys()


def test_what_was_built_is_kept_and_switched_to(made):
    session = Session(made[2]["requantized"], bits=8)
    first = session._current.executable
    session.switch(2)
    assert session.bits == 2 and session.widths == WIDTHS and session.additions == "requantized"
    session.switch(8)
    assert session._current.executable is first
    assert [kept.uniform for kept in session.ready] == [2, 8]


def test_the_memory_budget_drops_the_oldest(made):
    path = made[2]["requantized"]
    session = Session(path, bits=8)
    one = session.memory
    session.switch(6)
    each = session.memory - one
    assert each > 0
    small = Session(path, bits=8, memory=2 * each + each // 2)
    for width in (6, 8, 4):
        small.switch(width)
    assert [kept.uniform for kept in small.ready] == [8, 4]
    tiny = Session(path, bits=8, memory=0)
    tiny.switch(2)
    assert [kept.uniform for kept in tiny.ready] == [2]
    assert np.isfinite(tiny.run(made[1].numpy())).all()


def test_so_many_executables_are_kept_and_no_more(made, monkeypatch):
    monkeypatch.setattr("bitswitch.runtime.session._MOST_KEPT", 3)
    session = Session(made[2]["requantized"], bits=8)
    for width in (6, 4, 2):
        session.switch(width)
    assert [kept.uniform for kept in session.ready] == [6, 4, 2]


def test_without_a_temporary_folder_the_graph_is_not_blamed(made, monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(executable, "TemporaryDirectory", none)
    with pytest.raises(UserError, match="cannot be run here: No usable temporary directory found"):
        graph_report(made[2]["exact"])


def test_threads_run_while_another_switches(made):
    _, images, files = made
    session = Session(files["requantized"], threads=1)
    x = images[:2].numpy()
    outputs = []
    for width in WIDTHS:
        session.switch(width)
        outputs.append(session.run(x))
    assert not any(np.array_equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    seen: list[set[int]] = [set() for _ in range(8)]
    done = threading.Event()

    def run(mine):
        while not done.is_set():
            found = session.run(x)
            hits = [i for i, output in enumerate(outputs) if np.array_equal(found, output)]
            mine.add(hits[0] if hits else -1)

    threads = [threading.Thread(target=run, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    choice = np.random.default_rng(0)
    # On a busy machine a run may take as long as a thousand switches.
    end = time.monotonic() + 20
    for number in itertools.count():
        session.switch(int(choice.choice(WIDTHS)))
        if (number >= 1500 and len(set.union(*seen)) > 1) or time.monotonic() > end:
            break
    done.set()
    for thread in threads:
        thread.join()
    assert set.union(*seen) <= {0, 1, 2, 3} and len(set.union(*seen)) > 1


@pytest.mark.parametrize(
    ("wanted", "message"), [(5, "no width 5"), ({"nothing": 8}, "no quantized layer"), ({"conv2": 3}, "no width 3")]
)
def test_an_unknown_width_changes_nothing(made, wanted, message):
    session = Session(made[2]["requantized"], bits=4)
    with pytest.raises(UserError, match=message):
        session.switch(wanted)
    assert session.bits == 4
    with pytest.raises(UserError, match=message):
        Session(made[2]["requantized"], **({"bits": wanted} if isinstance(wanted, int) else {"assignment": wanted}))
    with pytest.raises(UserError, match="not both"):
        Session(made[2]["requantized"], bits=8, assignment={})


def test_inputs_that_do_not_fit(made):
    session = Session(made[2]["requantized"])
    with pytest.raises(UserError, match="do not fit"):
        session.run(np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(UserError, match="do not fit"):
        session.run(np.zeros((1, 3, 8, 8)))
    with pytest.raises(UserError, match="takes 1 inputs, not 2"):
        session.run(made[1].numpy(), made[1].numpy())
    with pytest.raises(UserError, match="an input is a Tensor: give NumPy arrays"):
        session.run(made[1])
    with pytest.raises(UserError, match="'2' is text"):
        session.switch("2")


def test_a_file_without_a_graph_names_what_adds_it(tmp_path, made):
    bs.save(made[0], tmp_path / "a")
    with pytest.raises(UserError, match="example_inputs"):
        Session(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"\x0a\xff\xff", b"\x72\x03\x0a\x01x", b"no protobuf at all"])
def test_a_damaged_graph_is_refused(tmp_path, made, content):
    header, tensors = artifact.read(made[2]["exact"])
    artifact.write(tmp_path / "a", header, tensors | {"graph": packed(content)})
    with pytest.raises(UserError, match="graph is damaged"):
        Session(tmp_path / "a")


def zeros(count):
    """Packed; made a little at a time."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(count // 2**20)) + packer.flush()


@pytest.mark.parametrize(
    "stored", [b"", b"no zlib", zlib.compress(bytes(9))[:-1], zlib.compress(b"a") * 2, zeros(2**29)]
)
def test_a_graph_that_is_not_packed_is_refused_before_it_fills_the_memory(tmp_path, made, stored):
    header, tensors = artifact.read(made[2]["exact"])
    artifact.write(tmp_path / "a", header, tensors | {"graph": np.frombuffer(stored, np.uint8)})
    with pytest.raises(UserError, match=r"graph is damaged or of another version; .*bitswitch export .* makes it anew"):
        Session(tmp_path / "a")


def test_a_graph_is_packed_so_that_it_can_be_read():
    """Nothing that is saved is refused; what a small file unpacks to is bounded."""
    names = b"".join(b"layer%d.conv.weight" % i for i in range(10_000))
    for graph in (b"", b"a", names, bytes(2**22), bytes(2**22 + 1), random.Random(0).randbytes(2**22 + 1), names * 64):
        stored = packed(graph)
        assert unpacked(stored) == graph
        assert len(graph) <= max(2**22, 4 * stored.nbytes)
    assert packed(names).nbytes < len(names) / 4
    with pytest.raises(ValueError, match="too large"):
        unpacked(np.frombuffer(zlib.compress(bytes(2**22 + 1)), np.uint8))


def outcome(path, images):
    """What became of a file whose graph somebody forged, its checksums right."""
    try:
        session = Session(path, threads=1)
        for width in WIDTHS:
            session.switch(width)
            session.run(images.numpy())
        graph_report(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return "refused"
    return "runs"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_graph_whose_bindings_are_forged_is_refused_in_one_line_or_runs(tmp_path, made):
    _, images, files = made
    header, tensors = artifact.read(files["requantized"])
    model = onnx.load_model_from_string(unpacked(tensors["graph"]))
    (entry,) = (entry for entry in model.metadata_props if entry.key == "bitswitch")
    honest, outcomes = entry.value, Counter()
    for seed in range(250):
        entry.value = json.dumps(_edit(json.loads(honest), random.Random(seed)))
        artifact.write(tmp_path / "a", header, tensors | {"graph": packed(model.SerializeToString())})
        outcomes[outcome(tmp_path / "a", images)] += 1
    assert outcomes["refused"] > 100
    entry.value = '{"a":' * 100_000
    artifact.write(tmp_path / "a", header, tensors | {"graph": packed(model.SerializeToString())})
    assert outcome(tmp_path / "a", images) == "refused"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_graph_of_which_bytes_are_changed_is_refused_in_one_line_or_runs(tmp_path, made):
    _, images, files = made
    header, tensors = artifact.read(files["requantized"])
    outcomes = Counter()
    for seed in range(150):
        draw = random.Random(seed)
        graph = bytearray(unpacked(tensors["graph"]))
        graph[draw.randrange(len(graph))] ^= 1 << draw.randrange(8)
        artifact.write(tmp_path / "a", header, tensors | {"graph": packed(bytes(graph))})
        outcomes[outcome(tmp_path / "a", images)] += 1
    assert outcomes["refused"] > 50


def test_the_graph_is_onnx_without_weights(made):
    _, tensors = artifact.read(made[2]["requantized"])
    model = onnx.load_model_from_string(unpacked(tensors["graph"]))
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert sum(np.prod(t.dims, dtype=int) for t in inside) < 100
    assert tensors["graph"].nbytes < 6_000


def test_an_artifact_with_a_graph_loads_as_before(tmp_path, made, network):
    model, images, files = made
    loaded = bs.load(files["requantized"], model=network, bits=4)
    assert np.array_equal(torch_logits(loaded, images, 4), torch_logits(model, images, 4))


def test_a_model_that_is_loaded_and_saved_keeps_the_graph_of_its_file(tmp_path, made, network):
    path = tmp_path / "first"
    path.write_bytes(made[2]["exact"].read_bytes())
    loaded = bs.load(path, bits=2, model=network)
    bs.upgrade(loaded)
    bs.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    with torch.no_grad():
        loaded.fc.bias.add_(1)
    with pytest.warns(UserWarning, match="not kept: the model has changed since"):
        bs.save(loaded, tmp_path / "changed")
    assert "graph" not in artifact.read(tmp_path / "changed")[1]
    loaded = bs.load(path, model=network)
    path.unlink()
    with pytest.warns(UserWarning, match="not kept: .*no such file"):
        bs.save(loaded, tmp_path / "alone")
    assert "graph" not in artifact.read(tmp_path / "alone")[1]


def test_the_runtime_never_imports_torch(made, tmp_path):
    np.save(tmp_path / "x.npy", made[1].numpy())
    code = (
        "import sys, numpy as np\nfor name in ('torch', 'onnx', 'onnx_ir'): sys.modules[name] = None\n"
        "from bitswitch.runtime import Session, graph_report\n"
        f"s = Session({str(made[2]['requantized'])!r}, bits=8); x = np.load({str(tmp_path / 'x.npy')!r})\n"
        "assert s.run(x).shape == (16, 5); s.switch(2); s.run(x); graph_report(" + repr(str(made[2]["exact"])) + ", 2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_onnx_runtime_is_named(made):
    code = (
        "import sys; sys.modules['onnxruntime'] = None\nfrom bitswitch.runtime import Session\n"
        f"try: Session({str(made[2]['requantized'])!r})\n"
        "except ValueError as e: assert 'bitswitch[runtime]' in str(e), e\nelse: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Coherent(nn.Module):
    """Weights of one sign, so that results of `two`, which feeds an addition, are large wherever those of `one` are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            for layer in (self.one, self.two, self.grouped):
                layer.weight.abs_()

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.one(x).relu()
        return self.head((self.two(y) + self.grouped(y) + x).mean((2, 3)))


def test_results_of_a_mixture_may_lie_where_those_of_one_width_do_not(tmp_path):
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = bs.quantize(Coherent().eval(), bits=(8, 4, 2), example_inputs=images).eval()
    # At 2 bits everywhere, `two` sees next to nothing.
    quantizer = model.one.input_quantizer
    quantizer.set_scale(2, quantizer.scale(2) / 100)
    bs.save(model, tmp_path / "m.safetensors", example_inputs=images)
    session = Session(tmp_path / "m.safetensors")
    for wanted in (8, 4, 2, {"one": 4, "two": 2, "grouped": 2}, {"one": 8, "two": 2, "grouped": 4}):
        session.switch(wanted)
        expected = torch_logits(model, images, wanted)
        assert snr_db(expected, session.run(images.numpy())) > 35, wanted
