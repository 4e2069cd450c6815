import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bitswitch.training import World
from bitswitch.training.distributed import share_batch_norm

SCRIPT = str(Path(__file__).with_name("ranks.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(out, ranks):
    command = [sys.executable] if ranks == 1 else [*TORCHRUN, str(ranks)]
    done = subprocess.run([*command, SCRIPT, out, "float64", "5", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The same steps by one process, and twice by two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return [run(folder / str(i), ranks) for i, ranks in enumerate((1, 2, 2))]


def test_two_ranks_are_one_process(seen):
    one, two, _ = seen
    assert set(one["first"]) == {8, 6, 4, 2}
    # Later widths' gradients come after a step, in which Adam makes much of the last bits.
    for name, gradient in one["first"][8].items():
        assert torch.allclose(gradient, two["first"][8][name], rtol=0, atol=1e-10), name
    assert torch.allclose(one["losses"], two["losses"], rtol=0, atol=1e-6)
    assert one["losses"][-1].max() < one["losses"][0].min()


def test_evaluation_is_the_same_exactly(seen):
    one, two, _ = seen
    assert one["scores"] == two["scores"] and [row[3] for row in one["scores"]] == [32] * 4


def test_ranks_write_the_same_numbers_each_time(seen):
    _, two, again = seen
    assert all(torch.equal(two["state"][name], again["state"][name]) for name in two["state"])


def test_a_rank_that_fails_ends_the_run_with_its_message(tmp_path):
    command = [*TORCHRUN, "2", "-m", "bitswitch", "run", "digits", "train.batch_size=63", "--out", str(tmp_path / "x")]
    result = subprocess.run([*command, "pretrain.epochs=1"], capture_output=True, text=True, timeout=200)
    assert result.returncode != 0
    assert "stage train: batch_size=63 cannot be shared evenly by 2 ranks" in result.stderr
    # Before the float network is trained for nothing.
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("apart", "told"), [("together", "trained"), ("apart", "the ranks' weights became different ones")]
)
def test_ranks_that_train_other_parameters_are_told(tmp_path, apart, told):
    """Of equal shapes, so that the averages of their gradients are of both; nothing but the weights shows it."""
    command = [*TORCHRUN, "2", str(Path(SCRIPT).with_name("apart.py")), str(tmp_path / "c"), apart]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.stdout.count(told) == 2, (result.stdout, result.stderr)
    assert (tmp_path / "c").exists() == (apart == "together")


def test_a_batch_normalization_of_ones_own_is_named():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), Own(3), nn.SyncBatchNorm(3))
    with pytest.warns(UserWarning, match=r"alone: Own keep"):
        share_batch_norm(model, World(0, 2))
    assert type(model[0]) is not nn.BatchNorm2d and type(model[1]) is Own


def test_one_rank_shares_nothing():
    model = nn.BatchNorm2d(2)
    share_batch_norm(model, World())
    assert type(model) is nn.BatchNorm2d
