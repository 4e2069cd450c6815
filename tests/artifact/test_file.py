import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bitswitch as bs
from bitswitch import artifact
from bitswitch.artifact.header import KEY
from bitswitch.errors import UserError


@pytest.fixture
def path(tmp_path, quantized):
    bs.save(quantized, tmp_path / "a.safetensors", provenance={"recipe": "none", "float_top1": 1.5})
    return tmp_path / "a.safetensors"


def rewritten(path, change_header=lambda header: None, change_tensors=lambda tensors: None):
    """The file again, by another writer, with changes that keep its own checksums."""
    header = json.loads(artifact.read_header(path).to_text())
    tensors = load_file(path)
    change_header(header)
    change_tensors(tensors)
    save_file(tensors, path, metadata={KEY: json.dumps(header)})


def test_any_safetensors_reader_opens_it(path):
    tensors = load_file(path)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.int8), np.dtype(np.float32), np.dtype(np.int32)}


def test_read_gives_what_was_written(path):
    header, tensors = artifact.read(path)
    assert artifact.Header.from_text(header.to_text()) == header
    assert header.widths == (8, 6, 4, 2) and header.provenance["float_top1"] == 1.5
    assert set(tensors) == set(header.checksums)
    again = path.with_name("b")
    artifact.write(again, header, tensors)
    assert again.read_bytes() == path.read_bytes()


def test_every_single_altered_byte_of_the_tensors_is_noticed(path):
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for position in range(start, len(whole), max(1, (len(whole) - start) // 200)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(UserError, match="altered"):
            artifact.read(path)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1, -100])
def test_a_cut_file_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="cannot be used"):
        artifact.read(path)


def test_a_missing_or_extra_tensor_is_named(path):
    rewritten(path, change_tensors=lambda t: t.pop("conv3.codes"))
    with pytest.raises(UserError, match=r"lacks tensor 'conv3.codes'"):
        artifact.read(path)


def test_an_extra_tensor_is_named(path):
    rewritten(path, change_tensors=lambda t: t.update(extra=np.zeros(1, np.float32)))
    with pytest.raises(UserError, match="'extra'"):
        artifact.read(path)


def test_what_a_layer_needs_must_be_there_even_if_the_checksums_agree(path):
    header, tensors = artifact.read(path)
    del tensors["conv3.input_scale"]
    artifact.write(path, header, tensors)
    with pytest.raises(UserError, match=r"lacks tensor 'conv3.input_scale'"):
        artifact.read(path)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_no_scale_is_refused(path, bad):
    header, tensors = artifact.read(path)
    tensors["conv2.input_scale"] = np.array([1, 1, 1, bad], np.float32)
    artifact.write(path, header, tensors)
    with pytest.raises(UserError, match="not positive and finite"):
        artifact.read(path)


def test_codes_beyond_their_bits_are_refused(tmp_path, network, images):
    bs.save(bs.quantize(network, example_inputs=images, bits=(4, 2)), tmp_path / "a")
    header, tensors = artifact.read(tmp_path / "a")
    tensors["conv2.codes"] = tensors["conv2.codes"].copy()
    tensors["conv2.codes"].flat[0] = 8
    artifact.write(tmp_path / "a", header, tensors)
    with pytest.raises(UserError, match="exceed 4 bits"):
        artifact.read(tmp_path / "a")


@pytest.mark.parametrize("version", [2, 99, "1", None])
def test_another_version_is_refused(path, version):
    rewritten(path, change_header=lambda h: h.update(version=version))
    with pytest.raises(UserError, match="version"):
        artifact.read(path)


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
        {"norms": 3},
        {"network": "name"},
        {"network": {}},
        {"checksums": None},
        {"classes": 3},
    ],
    ids=str,
)
def test_a_damaged_header_is_refused_in_one_line(path, change):
    rewritten(path, change_header=lambda h: h.update(change))
    with pytest.raises(UserError) as error:
        artifact.read(path)
    assert "\n" not in str(error.value)


def test_a_header_without_a_key_is_refused(path):
    for key in json.loads(artifact.read_header(path).to_text()):
        whole = path.read_bytes()
        rewritten(path, change_header=lambda h, key=key: h.pop(key))
        with pytest.raises(UserError):
            artifact.read(path)
        path.write_bytes(whole)


def test_other_safetensors_files_are_refused(tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "a")
    with pytest.raises(UserError, match="not an artifact of bitswitch"):
        artifact.read(tmp_path / "a")


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        artifact.read(tmp_path / "a")
    with pytest.raises(UserError, match="is a folder"):
        artifact.read(tmp_path)


def test_header_values_are_frozen(path):
    header = artifact.read_header(path)
    assert replace(header, per_channel=True) != header
