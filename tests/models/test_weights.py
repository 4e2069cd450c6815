from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitswitch.errors import UserError
from bitswitch.models import build, load_weights

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "resnet20-12fca82f.th"


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize(
    "nest", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}}]
)
def test_weights_of_others(tmp_path, prefix, nest):
    source, target = build("cifar_resnet8"), build("cifar_resnet8")
    torch.save(nest({prefix + name: t for name, t in source.state_dict().items()}), tmp_path / "a.pt")
    load_weights(target, tmp_path / "a.pt")
    assert same(source, target)


def test_safetensors_and_missing_counters(tmp_path):
    source, target = build("cifar_resnet8"), build("cifar_resnet8")
    save_file({n: t for n, t in source.state_dict().items() if "num_batches" not in n}, tmp_path / "a.safetensors")
    load_weights(target, tmp_path / "a.safetensors")
    assert same(source, target)


def test_a_checkpoint_that_holds_itself_ends(tmp_path):
    state = {}
    state["model"] = state
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no weights"):
        load_weights(build("cifar_resnet8"), tmp_path / "a.pt")


def test_tensors_without_plain_values_are_told(tmp_path):
    state = build("cifar_resnet8").state_dict()
    torch.save(state | {"linear.weight": state["linear.weight"].to("meta")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a.pt cannot be loaded: .*meta"):
        load_weights(build("cifar_resnet8"), tmp_path / "a.pt")


def test_a_mismatch_lists_what_is_wrong(tmp_path):
    state = build("cifar_resnet8").state_dict()
    state["linear.weight"] = torch.zeros(7, 64)
    state["extra"] = state.pop("conv1.weight")
    torch.save(state, tmp_path / "a.pt")
    target = build("cifar_resnet8")
    before = {n: t.clone() for n, t in target.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(target, tmp_path / "a.pt")
    for words in ("missing: conv1.weight", "unexpected: extra", "linear.weight (7, 64) for (10, 64)"):
        assert words in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in target.state_dict().items())


def test_what_is_no_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    for name in ("evil.pt", "noise.pt", "noise.safetensors", "list.pt", "none.pt", "missing.pt", "."):
        with pytest.raises(UserError) as error:
            load_weights(build("cifar_resnet8"), tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"the published ResNet20 is not at {PUBLISHED}")
def test_the_published_resnet20_loads():
    model = build("cifar_resnet20")
    load_weights(model, PUBLISHED)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
