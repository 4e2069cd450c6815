import pytest
import torch

from bitswitch.errors import UserError
from bitswitch.models import build, without_weights


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_cifar_resnets_have_the_published_counts(depth, parameters):
    model = build(f"cifar_resnet{depth}")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules()) == depth


def test_without_weights_none_are_fetched():
    args = {"weights": "DEFAULT", "num_classes": 2}
    assert without_weights("resnet18", args) == without_weights("cifar_resnet20", args) == {"num_classes": 2}
    # Where none are named, this one fetches those of its backbone.
    assert without_weights("fcn_resnet50", args) == {"num_classes": 2, "weights_backbone": None}


def test_option_b_projects():
    model = build("cifar_resnet20", {"shortcut": "B", "num_classes": 3, "in_channels": 1})
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 21


def test_by_name():
    assert build("resnet18", {"num_classes": 4})(torch.randn(1, 3, 64, 64)).shape == (1, 4)
    assert isinstance(build("torch.nn:Linear", {"in_features": 2, "out_features": 3}), torch.nn.Linear)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("cifar_resnet21", {}, "did you mean"),
        ("resnet17", {}, "did you mean 'resnet1"),
        ("no.such.module:f", {}, "cannot be imported"),
        ("torch.nn:Nothing", {}, "cannot be imported"),
        ("torch:__version__", {}, "not a function"),
        ("cifar_resnet20", {"colour": 1}, "does not take"),
        ("cifar_resnet20", {"shortcut": "C"}, "shortcut"),
        ("resnet18", {"weights": "IMAGENET1K_V9"}, "cannot be built .*IMAGENET1K_V9"),
        ("cifar_resnet20", {"num_classes": -1}, "cannot be built"),
        ("builtins:dict", {}, "gives a dict, not a torch.nn.Module"),
    ],
)
def test_bad_names_and_arguments(name, args, words):
    with pytest.raises(UserError, match=words):
        build(name, args)


def test_a_module_that_fails_while_it_is_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"'half_written:net' cannot be imported: SyntaxError"):
        build("half_written:net")


def test_a_module_that_ends_the_program_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ends_at_import.py").write_text("import sys\ndef net(): pass\nsys.exit(0)\n")
    (tmp_path / "ends_when_called.py").write_text("import sys\ndef net(): sys.exit(0)\n")
    with pytest.raises(UserError, match="'ends_at_import:net' cannot be imported: SystemExit"):
        build("ends_at_import:net")
    with pytest.raises(UserError, match=r"'ends_when_called:net' cannot be built with the arguments .*SystemExit"):
        build("ends_when_called:net")


def test_published_weights_for_other_classes_are_told_what_to_do():
    with pytest.raises(
        UserError, match=r"expected value 1000 but got 2.*model\.args=\{\} with pretrain\.epochs.*function of yours"
    ):
        build("resnet18", {"weights": "IMAGENET1K_V1", "num_classes": 2})
    with pytest.raises(UserError, match=r"^((?!model\.args).)*$"):
        build("resnet18", {"weights": "OTHER"})


def test_a_function_that_fails_is_named_whatever_it_raises(tmp_path, monkeypatch):
    (tmp_path / "half_done.py").write_text("def net(): import timm_of_another_name\ndef other(): return undefined\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, error in (("net", "ModuleNotFoundError: No module named"), ("other", "NameError: name 'undefined'")):
        with pytest.raises(UserError, match=f"'half_done:{name}' cannot be built .*{error}"):
            build(f"half_done:{name}")
