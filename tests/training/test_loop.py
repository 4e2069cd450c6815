import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch.errors import UserError
from bitswitch.training import (
    FloatObjective,
    JointObjective,
    Loop,
    World,
    evaluate,
    load_checkpoint,
    save_checkpoint,
)
from bitswitch.training.recalibrate import recalibrate


class Stream:
    def __init__(self, images, poison=None):
        self.images, self.poison = images, poison

    def __len__(self):
        return 3

    def epoch(self, epoch):
        for step in range(3):
            x = self.images + 0.01 * torch.randn(1)  # moves with the global generator, as dropout would
            yield (x * torch.nan if (epoch, step) == self.poison else x), torch.arange(len(x)) % 5


def loop(model, path, stream, epochs, joint=True, order="each"):
    objective = (
        JointObjective(model, bs.MultiPrecisionOptimizer(model), order)
        if joint
        else FloatObjective(model, lr=0.1, momentum=0.9, weight_decay=0)
    )
    return Loop(
        objective=objective,
        batches=stream,
        epochs=epochs,
        checkpoint=path,
        extra={},
        on_step=lambda: None,
        on_epoch=lambda *_: None,
    )


def test_weights_that_diverged_alike_on_all_ranks_are_not_told_as_different(tmp_path, network, images, monkeypatch):
    monkeypatch.setattr("bitswitch.training.loop.gather", lambda own, _: [*own, *pickle.loads(pickle.dumps(own))])
    training = loop(network, tmp_path / "c.pt", Stream(images), 1, joint=False)
    training.world = World(rank=0, size=2)
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    training._check_ranks()


@pytest.mark.parametrize("joint", [False, True])
def test_a_resumed_run_ends_with_the_same_numbers(tmp_path, network, quantized, images, joint):
    model = quantized if joint else network
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    loop(model, tmp_path / "a", Stream(images), 4, joint).run()

    class Killed(Exception):
        pass

    class Dies(Stream):
        def epoch(self, epoch):
            for step, batch in enumerate(super().epoch(epoch)):
                if (epoch, step) == (2, 1):
                    raise Killed
                yield batch

    torch.manual_seed(3)
    twin = copy.deepcopy(other)
    with pytest.raises(Killed):
        loop(twin, tmp_path / "b", Dies(images), 4, joint).run()
    torch.manual_seed(99)
    again = loop(other, tmp_path / "b", Stream(images), 4, joint)
    assert again.resume() == 2
    again.run()
    for (name, p), (_, q) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(p, q), name


def test_what_a_network_draws_is_of_its_seed_epoch_and_rank(tmp_path, network, images, monkeypatch):
    class Seeded(Exception):
        pass

    def seeded(number):
        raise Seeded(number)

    monkeypatch.setattr("bitswitch.training.loop.seed_all", seeded)
    training, found = loop(network, tmp_path / "c.pt", Stream(images), 2, joint=False), []
    for training.seed, training.epochs_done, rank in itertools.product((0, 1), repeat=3):
        training.world = World(rank=rank, size=2)
        with pytest.raises(Seeded) as told:
            training.run()
        found.append(told.value.args[0])
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("joint", [False, True])
def test_every_epoch_trains_in_training_mode(tmp_path, network, quantized, images, joint):
    model = (quantized if joint else network).eval()

    class Watched(Stream):
        def epoch(self, epoch):
            for batch in super().epoch(epoch):
                assert all(module.training for module in model.modules())
                yield batch

    training = loop(model, tmp_path / "c.pt", Watched(images), 2, joint)
    training.on_epoch = lambda *_: model.eval()
    training.run()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, quantized, images):
    with pytest.raises(UserError, match=r"loss at 8 bits is nan at step 1 of epoch 1.*last good checkpoint"):
        loop(quantized, tmp_path / "a", Stream(images, poison=(1, 1)), 4).run()
    state = load_checkpoint(tmp_path / "a")
    assert state["epochs_done"] == 1
    assert all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.parametrize("order", ["each", "accumulate"])
def test_joint_training_lowers_every_loss(tmp_path, quantized, images, order):
    seen = []
    run = loop(quantized, tmp_path / "a", Stream(images), 12, order=order)
    run.on_epoch = lambda epoch, losses: seen.append(losses)
    run.run()
    assert all(seen[-1][name] < seen[0][name] for name in ("8", "6", "4", "2"))


def test_accumulate_is_the_sum_of_the_gradients(quantized, images):
    labels = torch.arange(len(images)) % 5
    quantized.eval()
    optimizer = bs.MultiPrecisionOptimizer(quantized)
    sums: dict[str, torch.Tensor] = {}
    for width in optimizer.widths:
        with bs.switched(quantized, width):
            nn.functional.cross_entropy(quantized(images), labels).backward()
    sums = {n: p.grad.clone() for n, p in quantized.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    caught = {}

    def catch(width=None, *, mixed=False):
        assert width is None
        caught.update({n: p.grad.clone() for n, p in quantized.named_parameters() if p.grad is not None})

    optimizer.step = catch
    JointObjective(quantized, optimizer, "accumulate").step(images, labels, 1.0)
    assert sums.keys() == caught.keys() and all(torch.equal(sums[n], caught[n]) for n in sums)


def test_checkpoints_hold_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"x": Evil()}, tmp_path / "a")
    with pytest.raises(UserError, match="nor a readable checkpoint"):
        load_checkpoint(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="nor a readable checkpoint"):
        load_checkpoint(tmp_path / "b")
    save_checkpoint(tmp_path / "c", {"x": torch.ones(2)})
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-40])
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "c")


def test_evaluate_counts_every_image_once(quantized, images):
    labels = torch.arange(16) % 5
    batches = [(images[:10], labels[:10]), (images[10:], labels[10:])]
    bs.switch(quantized, 6)
    quantized.train()
    scores = evaluate(quantized, batches, [8, 2, {"conv2": 2}, None])
    assert quantized.training and set(bs.widths(quantized).values()) == {6}
    quantized.eval()
    for score, wanted in zip(scores, (8, 2, {"conv2": 2}, 6), strict=True):
        with bs.switched(quantized, wanted), torch.no_grad():
            logits = quantized(images)
        assert score.images == 16
        assert score.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
        assert score.top5 == 100
        assert score.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_evaluate_calls_a_compiled_network(quantized, images):
    """A compiled network is a module that has no length to be judged true or false by."""
    batches = [(images, torch.arange(16) % 5)]
    compiled = torch.compile(quantized, backend="eager")
    assert evaluate(quantized, batches, [8, 2], forward=compiled) == evaluate(quantized, batches, [8, 2])


def test_evaluate_refuses_labels_beyond_the_network(quantized, images):
    with pytest.raises(UserError, match="class 9"):
        evaluate(quantized, [(images, torch.full((16,), 9))], [8])
    with pytest.raises(UserError, match="no images"):
        evaluate(quantized, [], [8])


@pytest.mark.parametrize(("said", "given"), [(0, 0), (2, 3), (4, 3)])
def test_other_batches_than_announced_are_told(tmp_path, quantized, images, said, given):
    class Liar(Stream):
        def __len__(self):
            return said

        def epoch(self, epoch):
            return itertools.islice(super().epoch(epoch), given)

    found = "more" if given > said else str(given)
    with pytest.raises(UserError, match=f"epoch 0 has {found} batches, and {said} were announced"):
        loop(quantized, tmp_path / "a", Liar(images), 1).run()
    assert not (tmp_path / "a").exists()


def test_precisions_that_are_no_list(quantized, images):
    for wrong in (8, [], "8", {"conv2": 8}):
        with pytest.raises(UserError, match="give a list of widths"):
            evaluate(quantized, [(images, torch.zeros(len(images)).long())], wrong)
    with pytest.raises(UserError, match="give batches of images alone"):
        recalibrate(quantized, [(images, torch.zeros(len(images)))], 8)
