"""Real images, where they stand beside the repository."""

import tarfile
from pathlib import Path

import pytest
import torch

from bitswitch.data import FileDataSet, load_data

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample.tar"


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"{SAMPLE} is not there")
def test_real_imagenet_images(tmp_path, cpu, stream):
    with tarfile.open(SAMPLE) as tar:
        members = [m for m in tar.getmembers() if m.isfile()][1::20]
        for member in members:
            place = tmp_path / member.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(tar.extractfile(member).read())
    data = load_data(str(tmp_path / "imagenet-sample"))
    assert isinstance(data, FileDataSet) and data.size("test") == len(data.classes) == len(members) == 50
    x, y = stream(data.evaluation_batches("test", batch_size=16, device=cpu))
    assert x.shape == (50, 3, 224, 224) and y.tolist() == list(range(50))
    # Photographs under ImageNet's mean and standard deviation are near 0 and 1.
    assert x.mean().abs() < 0.3 and 0.7 < x.std() < 1.4
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in (data.preprocessing.std, data.preprocessing.mean))
    colour = (x * std + mean).diff(dim=1).abs().amax((1, 2, 3))
    assert int((colour < 1e-6).sum()) == 1  # grey
