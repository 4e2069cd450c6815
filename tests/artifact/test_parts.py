"""Loads of some planes alone: from a file, a file that is cut off, and over HTTP; and upgrades."""

import contextlib
import copy
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from forge import rewrite
from torch import nn

import bitswitch as bs
from bitswitch import artifact
from bitswitch.errors import UserError
from bitswitch.nn import quantized_layers
from mutate import table_of

WIDTHS = [(8, 6, 4, 2), (4, 3, 2)]
SLACK = 65536


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 512), *(nn.Linear(512, 512, bias=i == 0) for i in range(3)), nn.Linear(512, 4)]
    return nn.Sequential(*layers)


class Stored:
    """A quantized model, its file, and the sizes of the file's parts."""

    def __init__(self, folder, bits):
        self.x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        self.model = bs.quantize(network(), bits=bits, example_inputs=self.x).eval()
        self.path, self.bits = folder / "model.safetensors", bits
        bs.save(self.model, self.path)
        self.whole = self.path.read_bytes()
        table, tensors = table_of(self.whole)
        self.before_tensors = len(self.whole) - len(tensors)
        self.before_planes = self.before_tensors + table["plane.0"]["data_offsets"][0]
        self.weights = sum(layer.weight.numel() for layer in quantized_layers(self.model).values())
        self.plane = self.weights // 8

    def end(self, width):
        """The bytes that a width needs."""
        return self.before_planes + self.plane * min(width + 1, self.bits[0])

    def logits(self, width, model=None):
        with torch.no_grad(), bs.switched(model or self.model, width):
            return (model or self.model)(self.x)


@pytest.fixture(scope="module", params=WIDTHS, ids=str)
def stored(request, tmp_path_factory):
    return Stored(tmp_path_factory.mktemp("stored"), request.param)


@pytest.fixture
def path(stored, tmp_path):
    """A copy that may be damaged."""
    (tmp_path / "copy").write_bytes(stored.whole)
    return tmp_path / "copy"


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_file_is_as_small_as_its_planes(stored):
    floats = stored.before_planes - stored.before_tensors
    assert stored.plane * stored.bits[0] == stored.weights * stored.bits[0] // 8
    assert len(stored.whole) <= 1.01 * (stored.weights * stored.bits[0] / 8 + floats) + SLACK


def test_a_part_serves_its_widths_and_no_more(stored):
    for width in stored.bits:
        model = bs.load(stored.path, bits=width, model=network())
        for other in stored.bits:
            if min(other + 1, stored.bits[0]) <= min(width + 1, stored.bits[0]):
                assert torch.equal(stored.logits(other, model), stored.logits(other))
            else:
                for wanted in (other, {"2": other}):
                    with pytest.raises(UserError, match=rf"upgrade\(model, bits={other}\)"):
                        bs.switch(model, wanted)
                assert set(bs.widths(model).values()) == {width}


def test_a_part_is_not_written_as_a_whole(stored, tmp_path):
    model = bs.load(stored.path, bits=2, model=network())
    with pytest.raises(UserError, match="upgrade"):
        bs.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("step", [1, 2])
def test_upgrades_reach_every_width(stored, step):
    widths = list(reversed(stored.bits))[::step]
    model = bs.load(stored.path, bits=widths[0], model=network())
    for width in widths:
        bs.upgrade(model, bits=width)
        assert set(bs.widths(model).values()) == {width}
        assert torch.equal(stored.logits(width, model), stored.logits(width))
    bs.upgrade(model)
    assert set(bs.widths(model).values()) == {stored.bits[0]}
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.stored_codes(), quantized_layers(stored.model)[name].stored_codes())


def test_an_upgrade_of_a_copy_leaves_the_other_as_it_was(stored):
    model = bs.load(stored.path, bits=2, model=network())
    other = copy.deepcopy(model)
    bs.upgrade(other)
    assert torch.equal(stored.logits(stored.bits[0], other), stored.logits(stored.bits[0]))
    with pytest.raises(UserError, match="upgrade"):
        bs.switch(model, stored.bits[0])
    assert torch.equal(stored.logits(2, model), stored.logits(2))


def test_mixed_widths_read_the_planes_of_the_highest(stored, path):
    names = list(bs.widths(stored.model))
    low = dict.fromkeys(names, 2)
    path.write_bytes(stored.whole[: stored.end(2)])
    assert set(bs.widths(bs.load(path, assignment=low, model=network())).values()) == {2}
    mixed = low | {names[1]: stored.bits[0]}
    with pytest.raises(UserError, match="cut off"):
        bs.load(path, assignment=mixed, model=network())
    with pytest.raises(UserError, match="cut off"):
        # The layers that are not named stand at the highest width.
        bs.load(path, assignment={names[1]: 2}, model=network())
    model = bs.load(stored.path, assignment=mixed, model=network())
    with torch.no_grad(), bs.switched(stored.model, mixed):
        assert torch.equal(model(stored.x), stored.model(stored.x))


def test_upgrade_needs_a_loaded_model(stored):
    with pytest.raises(UserError, match="was not loaded"):
        bs.upgrade(stored.model)
    model = bs.load(stored.path, bits=2, model=network())
    with pytest.raises(UserError, match="no width 5"):
        bs.upgrade(model, bits=5)


@pytest.mark.parametrize("width", [5, "8", True, None])
def test_a_width_that_is_not_there_is_told_before_anything_is_read(stored, path, width):
    path.write_bytes(stored.whole[: stored.before_tensors])
    with pytest.raises(UserError) as error:
        bs.load(path, assignment={"2": width}, model=network())
    assert "no width" in one_line(error)


# A file that is cut off.


def test_every_cut_serves_the_widths_that_it_holds(stored, path):
    ends = {width: stored.end(width) for width in stored.bits}
    cuts = {stored.before_planes, len(stored.whole), *(end + i for end in ends.values() for i in (-1, 0, 1))}
    for cut in sorted(cuts & set(range(len(stored.whole) + 1))):
        path.write_bytes(stored.whole[:cut])
        served = [width for width in stored.bits if ends[width] <= cut]
        for width in stored.bits:
            if width in served:
                assert torch.equal(bs.load(path, bits=width, model=network())(stored.x), stored.logits(width))
            else:
                with pytest.raises(UserError) as error:
                    bs.load(path, bits=width, model=network())
                told = one_line(error)
                assert (
                    f"serves {served[0]} bits at most; load bits={served[0]}" in told if served else "no width" in told
                )
        assert artifact.read_header(path).widths == stored.bits


@pytest.mark.parametrize("cut", [0, 4, 8, 500])
def test_a_cut_before_the_tensors_serves_nothing(stored, path, cut):
    path.write_bytes(stored.whole[:cut])
    for width in stored.bits:
        with pytest.raises(UserError, match="cut off"):
            bs.load(path, bits=width, model=network())


def test_a_file_that_grew_can_be_upgraded_from(stored, path):
    path.write_bytes(stored.whole[: stored.end(2)])
    model = bs.load(path, bits=2, model=network())
    with pytest.raises(UserError, match="cut off"):
        bs.upgrade(model)
    assert torch.equal(stored.logits(2, model), stored.logits(2))
    path.write_bytes(stored.whole)
    bs.upgrade(model)
    assert torch.equal(stored.logits(stored.bits[0], model), stored.logits(stored.bits[0]))


def test_an_upgrade_from_another_file_is_refused_and_changes_nothing(stored, path):
    model = bs.load(path, bits=2, model=network())
    header, tensors = artifact.read(path)
    tensors["2.codes"].flat[0] ^= 1
    artifact.write(path, header, tensors)
    with pytest.raises(UserError) as error:
        bs.upgrade(model)
    assert "altered" in one_line(error)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        bs.upgrade(model)
    assert torch.equal(stored.logits(2, model), stored.logits(2))
    assert set(bs.widths(model).values()) == {2}


def test_a_graph_between_floats_and_planes_is_not_in_the_way(stored, path):
    header, tensors = artifact.read(path)
    artifact.write(path, header, tensors | {"graph": torch.arange(7, dtype=torch.uint8).numpy()})
    assert torch.equal(bs.load(path, bits=2, model=network())(stored.x), stored.logits(2))
    rewrite(path, lambda h: h["checksums"].update(graph="damaged"))
    # It is not read, so it cannot be told.
    assert torch.equal(bs.load(path, model=network())(stored.x), stored.logits(stored.bits[0]))
    with pytest.raises(UserError, match="'graph' is altered"):
        artifact.read(path)


# Bytes, counted at the file.


COUNTS = Path("/proc/thread-self/io")


def bytes_read(action):
    """What this thread reads meanwhile, as the system counts it: from files, sockets and the like."""

    def count():
        return int(re.search(r"rchar: (\d+)", COUNTS.read_text())[1])

    start = count()
    own = count() - start
    action()
    return count() - start - 2 * own


@pytest.mark.skipif(not COUNTS.exists(), reason="the system does not count")
def test_bytes_read_from_a_file(stored):
    size, made = len(stored.whole), network()
    bs.load(stored.path, model=made)  # imports and the like
    for width in stored.bits:
        end, share = stored.end(width), min(width + 1, stored.bits[0]) / 8
        assert end <= stored.before_planes + share * stored.weights + SLACK
        models = []
        read = bytes_read(
            lambda width=width, models=models: models.append(bs.load(stored.path, bits=width, model=made))
        )
        # A few bytes more or less: the count itself is read, and its length changes.
        assert abs(read - end) < 64
        assert abs(bytes_read(lambda models=models: bs.upgrade(*models)) - (size - end)) < 64
    assert abs(bytes_read(lambda: artifact.read_header(stored.path)) - stored.before_tensors) < 64


# Over HTTP.


class Handler(BaseHTTPRequestHandler):
    """One file, by ranges; or as a server that has a fault."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(None)

    def do_GET(self):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.answer((int(found[1]), int(found[2]) + 1) if found and self.server.fault != "no ranges" else None)

    def answer(self, span):
        server = self.server
        if self.path != "/model.safetensors" or server.fault == "gone":
            self.send_error(404)
            return
        start, stop = span or (0, len(server.content))
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = server.content[start:stop]
        if server.fault == "cut" and len(body) > 5000:
            body, self.close_connection = body[:3000], True
        if span:
            server.spans.append(span)
        # Before it is written: who reads it may look at the count at once.
        server.sent += len(body)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(stored):
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.spans, server.sent, server.fault = stored.whole, [], 0, None
        server.url = f"http://127.0.0.1:{server.server_port}/model.safetensors"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_over_http_only_what_is_needed_is_fetched(stored, server):
    for width in stored.bits:
        server.spans, server.sent = [], 0
        model = bs.load(server.url, bits=width, model=network())
        end = stored.end(width)
        assert server.spans == [(0, 8), (8, stored.before_tensors), (stored.before_tensors, end)]
        assert server.sent == end <= stored.before_planes + min(width + 1, stored.bits[0]) / 8 * stored.weights + SLACK
        assert torch.equal(model(stored.x), stored.logits(width))
        server.spans, server.sent = [], 0
        bs.upgrade(model)
        assert server.spans == ([(end, len(stored.whole))] if end < len(stored.whole) else [])
        assert torch.equal(model(stored.x), stored.logits(stored.bits[0]))
        server.spans = []
        bs.upgrade(model, bits=width)
        assert server.spans == [] and set(bs.widths(model).values()) == {width}


def test_over_http_header_and_whole(stored, server):
    assert artifact.read_header(server.url) == artifact.read_header(stored.path)
    assert server.sent == stored.before_tensors
    header, tensors = artifact.read(server.url)
    local, found = artifact.read(stored.path)
    assert header == local and all((tensors[name] == found[name]).all() for name in found)


def test_over_http_a_prefix_serves_what_it_holds(stored, server):
    server.content = stored.whole[: stored.end(2)]
    assert torch.equal(bs.load(server.url, bits=2, model=network())(stored.x), stored.logits(2))
    with pytest.raises(UserError, match="load bits=2, or fetch"):
        bs.load(server.url, bits=stored.bits[0], model=network())


@pytest.mark.parametrize(
    ("fault", "message"),
    [("gone", "no such file"), ("no ranges", "range requests"), ("cut", "cannot be read")],
)
def test_over_http_faults_are_told_in_one_line(stored, server, fault, message):
    model = bs.load(server.url, bits=2, model=network())
    server.fault, server.sent = fault, 0
    for attempt in (lambda: bs.load(server.url, bits=2, model=network()), lambda: bs.upgrade(model)):
        with pytest.raises(UserError) as error:
            attempt()
        assert message in one_line(error) and server.url in str(error.value)
    assert torch.equal(stored.logits(2, model), stored.logits(2))
    server.fault = None
    bs.upgrade(model)
    assert torch.equal(model(stored.x), stored.logits(stored.bits[0]))


def test_no_server_and_no_such_protocol():
    pytest.importorskip("fsspec")
    for url in ("http://127.0.0.1:9/a", "nonsense://a"):
        with pytest.raises(UserError) as error:
            bs.load(url, bits=2)
        assert url in one_line(error)


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(UserError, match=r"bitswitch\[remote\]"):
        bs.load("http://127.0.0.1/a")


def test_other_protocols_of_fsspec(stored):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/model", stored.whole)
    for url in ("memory://model", f"file://{stored.path}"):
        model = bs.load(url, bits=2, model=network())
        bs.upgrade(model)
        assert torch.equal(model(stored.x), stored.logits(stored.bits[0]))


def test_an_upgrade_finds_its_file_from_another_folder(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(stored.path.parent)
    model = bs.load(stored.path.name, bits=2, model=network())
    monkeypatch.chdir(tmp_path)
    bs.upgrade(model)
    assert torch.equal(stored.logits(stored.bits[0], model), stored.logits(stored.bits[0]))
