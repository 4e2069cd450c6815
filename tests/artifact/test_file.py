import hashlib
import importlib.util
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forge import rewrite
from safetensors.numpy import load_file, save_file

import bitswitch as bs
from bitswitch import artifact
from bitswitch.artifact.container import entries
from bitswitch.artifact.header import KEY, Header
from bitswitch.artifact.source import Damaged, Source
from bitswitch.errors import UserError
from bitswitch.nn import quantized_layers
from mutate import table_of, with_table


@pytest.fixture
def path(tmp_path, quantized):
    bs.save(quantized, tmp_path / "a.safetensors", provenance={"recipe": "none", "float_top1": 1.5})
    return tmp_path / "a.safetensors"


def refusal(path, read=artifact.read):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path)) and len(str(error.value)) < 600
    return str(error.value)


def planes_of(model):
    return sum(-(-layer.stored_shape.numel() // 8) for layer in quantized_layers(model).values())


def test_any_safetensors_reader_opens_it(path):
    tensors = load_file(path)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.int32)}


def test_floats_come_first_and_planes_last_most_significant_first(path):
    header, tensors = artifact.read(path)
    artifact.write(path, header, tensors | {"graph": np.arange(5, dtype=np.uint8)})
    table, _ = table_of(path.read_bytes())
    assert table.pop("__metadata__").keys() == {KEY}
    names = sorted(table, key=lambda name: table[name]["data_offsets"])
    assert names[-9:] == ["graph", *(f"plane.{i}" for i in range(8))]
    assert {table[name]["dtype"] for name in names[:-9]} == {"F32", "I32"}
    header, again = artifact.read(path)
    assert again["graph"].tolist() == [0, 1, 2, 3, 4] and "graph" in header.checksums


@pytest.mark.parametrize("bits", [(8, 6, 4, 2), (4, 3, 2), (8,), (7, 5)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_an_independent_reader_finds_the_same_in_a_prefix(tmp_path, network, images, bits, per_channel):
    location = Path(__file__).with_name("independent_reader.py")
    assert "bitswitch import" not in location.read_text() and "import safetensors" not in location.read_text()
    specification = importlib.util.spec_from_file_location("independent_reader", location)
    independent = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(independent)
    model = bs.quantize(network, example_inputs=images, bits=bits, per_channel=per_channel)
    bs.save(model, tmp_path / "a", provenance={"name": 'ä "digest"', "digest": "0" * 64})
    _, tensors = artifact.read(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    for width in bits:
        prefix = whole[: len(whole) - (bits[0] - min(width + 1, bits[0])) * planes_of(model)]
        _, others, weights = independent.read(prefix, width)
        assert others.keys() == {name for name in tensors if not name.endswith(".codes")}
        for name, array in others.items():
            assert array.dtype == tensors[name].dtype and np.array_equal(array, tensors[name])
        for name, layer in quantized_layers(model).items():
            assert np.array_equal(weights[name], layer.weight_at(width).detach().numpy())
        with pytest.raises(AssertionError, match="not in this prefix"):
            independent.read(prefix[:-1], width)


def test_read_gives_what_was_written(path, quantized):
    header, tensors = artifact.read(path)
    assert Header.from_text(header.to_text()) == header == artifact.read_header(path)
    assert header.widths == (8, 6, 4, 2) and header.provenance["float_top1"] == 1.5
    planes = {f"plane.{i}" for i in range(8)}
    codes = {f"{layer.name}.codes" for layer in header.layers}
    assert set(tensors) - codes == set(header.checksums) - planes and planes <= set(header.checksums)
    for name, layer in quantized_layers(quantized).items():
        assert np.array_equal(tensors[f"{name}.codes"], layer.stored_codes().numpy())
    again = path.with_name("b")
    artifact.write(again, header, tensors)
    assert again.read_bytes() == path.read_bytes()


def test_every_single_altered_byte_is_noticed(path):
    before, whole = artifact.read(path), path.read_bytes()
    start = len(whole) - len(table_of(whole)[1])
    for position in range(0, len(whole), max(1, len(whole) // 500)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        if position >= start:
            assert "altered" in refusal(path)
            assert artifact.read_header(path) == before[0]
        else:
            refusal(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"fc.weight":{"dtype":"F32"', b'"fc.weight":{"dtype":"I32"'),
        (b'"shape":[5,12]', b'"shape":[12,5]'),
        (b'"shape":[5,12]', b'"shape":[60  ]'),
    ],
)
def test_a_type_or_shape_that_the_table_alone_changes_is_noticed(path, before, after):
    whole = path.read_bytes()
    assert whole.count(before) == 1 and len(before) == len(after)
    path.write_bytes(whole.replace(before, after))
    assert "'fc.weight' is altered" in refusal(path)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1, -100])
def test_a_cut_file_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    assert "cut off" in refusal(path)


@pytest.mark.parametrize("more", [b"\0", b"\0" * 1000])
def test_what_follows_the_last_tensor_is_refused(path, more):
    path.write_bytes(path.read_bytes() + more)
    assert f"{len(more)} bytes follow" in refusal(path)


@pytest.mark.parametrize("length", [2**24 + 1, 2**63, 2**64 - 1])
def test_an_absurd_length_of_the_table_is_refused(path, length):
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "not a safetensors file" in refusal(path)


def huge(table):
    table["fc.weight"] |= {"shape": [2**46, 2**46], "data_offsets": [0, 2**94]}


def huge_and_consistent(table):
    # Contiguous, of the right size for its shape: only the file's own size speaks against it.
    last = max((e for n, e in table.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
    last |= {"shape": [2**40], "data_offsets": [last["data_offsets"][0], last["data_offsets"][0] + 2**40]}


def overlapping(table):
    table["fc.bias"]["data_offsets"] = [offset + 4 for offset in table["fc.bias"]["data_offsets"]]


def exchanged(table):
    a, b = table["plane.0"], table["plane.1"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (huge, "'fc.weight' has no type, shape and place"),
        (huge_and_consistent, "'plane.7' is U8"),
        (overlapping, "leaves a gap or overlaps"),
        (exchanged, "planes do not come last"),
        (lambda t: t.update({"fc.bias": 3}), "'fc.bias' has no type"),
        (lambda t: t["fc.bias"].update(shape=[-1, -5]), "'fc.bias' has no type"),
        (lambda t: t["fc.bias"].update(shape=[5.0]), "'fc.bias' has no type"),
        (lambda t: t["fc.bias"].update(shape=[True] * 5), "'fc.bias' has no type"),
        (lambda t: t["fc.bias"].update(shape=[5] + [1] * 40), "'fc.bias' has no type"),
        (lambda t: t["fc.bias"].update(shape="5"), "'fc.bias' has no type"),
        (lambda t: t["fc.bias"].update(dtype="F64"), "'fc.bias' has no type"),
        (lambda t: t["fc.bias"].update(dtype=["F32"]), "'fc.bias' has no type"),
        (lambda t: t["fc.bias"].update(more=1), "'fc.bias' has no type"),
        (lambda t: t["fc.bias"].update(data_offsets=[20]), "'fc.bias' has no type"),
        (lambda t: t.pop("fc.bias"), "leaves a gap"),
        (lambda t: t.pop("__metadata__"), "not an artifact of bitswitch"),
        (lambda t: t.update(__metadata__=[]), "not an artifact of bitswitch"),
        (lambda t: t.update(__metadata__={KEY: 3}), "not an artifact of bitswitch"),
        (lambda t: t.update(__metadata__={KEY: "[]"}), "header is not one of bitswitch"),
        (lambda t: t.update(__metadata__={KEY: "["}), "header is not one of bitswitch"),
    ],
)
def test_a_damaged_table_is_refused(path, change, message):
    table, tensors = table_of(path.read_bytes())
    change(table)
    path.write_bytes(with_table(table, tensors))
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {}, "a": {}}', "a key is given twice"),
        ("[]", "no table"),
        ("{", "table of tensors is damaged"),
        ('{"a": NaN}', "no number of JSON"),
        ('{"a": 1e999}', "no number of JSON"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_table_that_is_no_table(path, text, message):
    path.write_bytes(with_table(text, b""))
    assert message in refusal(path)


def test_a_key_twice_in_the_header(path):
    table, tensors = table_of(path.read_bytes())
    text = table["__metadata__"][KEY]
    table["__metadata__"][KEY] = text.replace('"version":2', '"version":2,"version":2')
    path.write_bytes(with_table(table, tensors))
    assert "a key is given twice" in refusal(path)


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (None, lambda t: t.pop("plane.3"), "planes do not come last, from plane.0 to plane.7"),
        (None, lambda t: t.update({"plane.8": t["plane.7"]}), "planes do not come last"),
        (None, lambda t: t.update({"plane.3": t["plane.3"][:-1]}), "tensor 'plane.3' is U8"),
        (None, lambda t: t.update({"plane.3": t["plane.3"][None]}), "tensor 'plane.3' is U8"),
        (
            None,
            lambda t: t.update({"other": t["plane.3"]}),
            "a tensor 'other' that this bitswitch does not know; upgrade",
        ),
        (None, lambda t: t.update({"zebra": t["plane.3"]}), "planes do not come last"),
        (None, lambda t: t.update({"graph": np.zeros(3, np.float32)}), "graph does not come right before"),
        (None, lambda t: t.update({"graph": t["plane.0"][None]}), "tensor 'graph' is U8"),
        (None, lambda t: t.update({"multiplier.conv2": np.ones(4, np.float32)}), "'multiplier.conv2' that this"),
        (None, lambda t: t.update({"conv2.codes": np.ones(4, np.float32)}), "'conv2.codes' that this"),
        (None, lambda t: t.update({"half": np.ones(4, np.float16)}), "'half' has no type"),
        (None, lambda t: t.pop("conv3.input_scale"), "lacks tensor 'conv3.input_scale'"),
        (None, lambda t: t.update({"conv3.input_scale": np.ones(3, np.float32)}), "not float32 (4,)"),
        (None, lambda t: t.update({"conv3.input_scale": np.ones(4, np.int32)}), "not float32 (4,)"),
        (None, lambda t: t.pop("conv3.input_offset"), "lacks tensor 'conv3.input_offset'"),
        (None, lambda t: t["conv3.input_offset"].__setitem__(0, np.nan), "'conv3.input_offset' is not finite"),
        (lambda h: h["checksums"].pop("fc.bias"), None, "a tensor of its own, 'fc.bias'"),
        (lambda h: h["checksums"].update(other="0"), None, "lacks tensor 'other'"),
        (lambda h: h["checksums"].update({"fc.bias": "0"}), None, "'fc.bias' is altered"),
        (lambda h: h["checksums"].update({"plane.7": "0"}), None, "'plane.7' is altered"),
        (lambda h: h["layers"][0].update(shape=[2**40, 2**40]), None, "tensor 'plane.0' is U8"),
        (lambda h: h["layers"][0].update(shape=[2**48]), None, "has the shape"),
        (lambda h: h["layers"][0].update(shape=[8, 8, 3, 4]), None, "tensor 'plane.0' is U8"),
        (lambda h: h.update(widths=[4, 2]), None, "damaged"),
        (None, lambda t: t["bn2.running_var"].__setitem__((0, 0), -1), "'bn2.running_var' holds what no batch"),
        (None, lambda t: t["bn2.running_mean"].__setitem__((0, 0), np.nan), "'bn2.running_mean' holds what no batch"),
        (None, lambda t: t["bn2.weight"].__setitem__((0, 0), np.inf), "'bn2.weight' holds what no batch"),
        (lambda h: h["layers"][0]["squared_error"].update({"08": 1.0}), None, "lacks the squared error"),
        (lambda h: h["layers"][0]["squared_error"].update({"8": True}), None, "lacks the squared error"),
        (lambda h: h["layers"][0]["squared_error"].update({"8": -1.0}), None, "lacks the squared error"),
    ],
)
def test_a_forged_file_is_refused(path, header, tensors, message):
    rewrite(path, header or (lambda h: None), tensors or (lambda t: None))
    assert message in refusal(path)


@pytest.mark.parametrize("deep", [60, 70])
def test_provenance_that_is_too_deep_to_be_written_again_is_refused(path, deep, quantized, network, tmp_path):
    provenance = {}
    for _ in range(deep):
        provenance = {"a": provenance}
    rewrite(path, lambda header: header.update(provenance=provenance))
    if deep < 64:
        bs.save(bs.load(path, model=network), tmp_path / "again")
        assert artifact.read_header(tmp_path / "again").provenance == provenance
    else:
        assert "nested too deeply" in refusal(path)
        with pytest.raises(UserError, match="nested too deeply"):
            bs.save(quantized, tmp_path / "again", provenance=provenance)


def test_half_a_surrogate_pair_which_could_not_be_written_again_is_refused(path):
    table, tensors = table_of(path.read_bytes())
    header = json.loads(table["__metadata__"][KEY]) | {"classes": ["\ud800"], "digest": "0" * 64}
    text = json.dumps(header)
    table["__metadata__"][KEY] = text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest())
    path.write_bytes(with_table(table, tensors))
    assert "surrogates not allowed" in refusal(path)


def test_metadata_that_are_no_text_are_refused(path):
    table, tensors = table_of(path.read_bytes())
    table["__metadata__"]["more"] = 3
    path.write_bytes(with_table(table, tensors))
    assert "no such header" in refusal(path)


def test_classes_by_name_have_no_order(path, tmp_path, quantized):
    for classes in ({"zebra": 0, "ant": 1}, [3], "abc"):
        with pytest.raises(UserError, match="no tuple of names in the order of the logits"):
            bs.save(quantized, tmp_path / "other", classes=classes)
    bs.save(quantized, tmp_path / "other", classes=["zebra", "ant"])
    assert artifact.read_header(tmp_path / "other").classes == ("zebra", "ant")
    # Which was taken once.
    rewrite(tmp_path / "other", lambda h: h.update(classes=[1, 0]))
    assert artifact.read_header(tmp_path / "other").classes == ("1", "0")


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_no_scale_is_refused(path, bad):
    header, tensors = artifact.read(path)
    tensors["conv2.input_scale"] = np.array([1, 1, 1, bad], np.float32)
    artifact.write(path, header, tensors)
    assert "'conv2.input_scale'" in refusal(path)


def test_codes_beyond_their_bits_are_not_written(tmp_path, network, images):
    bs.save(bs.quantize(network, example_inputs=images, bits=(4, 2)), tmp_path / "a")
    header, tensors = artifact.read(tmp_path / "a")
    tensors["conv2.codes"].flat[0] = 8
    with pytest.raises(UserError, match="exceed 4 bits"):
        artifact.write(tmp_path / "b", header, tensors)
    tensors["conv2.codes"] = tensors["conv2.codes"].astype(np.int16)
    with pytest.raises(UserError, match="is int16"):
        artifact.write(tmp_path / "b", header, tensors)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "added",
    [
        {"plane.3": np.zeros(2, np.float32)},
        {"multiplier.conv2": np.zeros(2, np.float32)},
        {"graph": np.zeros(2, np.float32)},
        {"bytes": np.zeros(2, np.uint8)},
        {"double": np.zeros(2)},
    ],
    ids=lambda added: next(iter(added)),
)
def test_what_the_format_keeps_for_its_own_is_not_written(path, added):
    header, tensors = artifact.read(path)
    with pytest.raises(UserError, match=next(iter(added))):
        artifact.write(path.with_name("b"), header, tensors | added)


@pytest.mark.parametrize("version", [1, 3, 99, "2", True, 2.0, None])
def test_another_version_is_refused(path, version):
    rewrite(path, lambda h: h.update(version=version))
    assert f"format version {version!r}" in refusal(path) and "upgrade bitswitch" in refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [8, 9]},
        {"widths": []},
        {"widths": "8"},
        {"layers": []},
        {"layers": None},
        {"layers": [{}]},
        {"norms": {"bn1": "nowhere"}},
        {"norms": {"bn2": "nowhere"}},
        {"norms": 3},
        {"per_channel": 0},
        {"transitional": None},
        {"network": "name"},
        {"network": {}},
        {"checksums": None},
        {"classes": 3},
        {"classes": "abc"},
        {"classes": {"a": 0, "b": 1}},
        {"classes": [1, None]},
        {"frontier": [3]},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_damaged_header_is_refused_in_one_line(path, change):
    rewrite(path, lambda h: h.update(change))
    assert "header is damaged" in refusal(path)


def test_a_header_without_a_key_is_refused(path):
    whole = path.read_bytes()
    for key in json.loads(artifact.read_header(path).to_text()):
        if key != "digest":
            rewrite(path, lambda h, key=key: h.pop(key))
            refusal(path)
            path.write_bytes(whole)


@pytest.mark.parametrize("digest", [None, 3, "", "0" * 64, "A" * 64, "{"])
def test_a_header_with_another_digest_is_refused(path, digest):
    table, tensors = table_of(path.read_bytes())
    value = json.loads(table["__metadata__"][KEY])
    table["__metadata__"][KEY] = json.dumps(value | {"digest": digest})
    path.write_bytes(with_table(table, tensors))
    assert "header is damaged" in refusal(path)


def test_other_safetensors_files_are_refused(tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "a")
    assert "not an artifact of bitswitch" in refusal(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    assert "not a safetensors file" in refusal(tmp_path / "b")


def test_no_file_a_folder_and_no_regular_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "a")
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


class Trickle(io.BytesIO):
    """A stream that gives a few bytes at a time, as one over a network may."""

    def readinto(self, buffer):
        return super().readinto(buffer[:7])


def test_what_comes_in_pieces_is_read_whole():
    content = bytes(range(256))
    source = Source(Trickle(content), "x", OSError)
    assert source.read(3, 200) == content[3:200]
    source.size = 300
    with pytest.raises(Damaged, match="ended after 256 of 300 bytes"):
        source.read(0, 300)


@pytest.mark.parametrize(("before", "row"), [(None, 1), ("conv2", 1), ("conv3", 2 * 4 + 1)])
def test_the_row_of_a_transitional_norm(path, before, row):
    header = replace(artifact.read_header(path), norms={"bn2": "conv2"}, before={"bn2": before})
    assignment = {"conv2": 6, "conv3": 4, "conv4": 8}
    assert replace(header, transitional=True).norm_row("bn2", assignment) == row
    assert replace(header, transitional=False).norm_row("bn2", assignment) == 1


def test_header_values_are_frozen(path):
    header = artifact.read_header(path)
    assert replace(header, per_channel=True) != header


def test_a_shape_that_no_array_can_have_is_refused():
    with pytest.raises(UserError, match="no type, shape and place"):
        entries({"x": {"dtype": "F32", "shape": [0, 1 << 47, 1 << 47], "data_offsets": [0, 0]}}, 0)
