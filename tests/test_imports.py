"""The house: who may import whom, and what loads without torch."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bitswitch

SOURCE = Path(bitswitch.__file__).parent
# Every room may import the rooms to the left of it, none to the right; rooms in one set do not see each other unless said.
LEVELS = [
    {"version"},
    {"errors"},
    {"files"},
    {"codes", "assignment"},
    {"numerics", "artifact"},
    {"nn", "runtime"},
    {"models", "data"},
    {"training", "search", "export"},
    {"config", "rundir", "machine", "subject"},
    {"pipeline", "evaluation"},
    {"deployment", "bench"},
    {"cli"},
    {"start"},
    {"__main__"},
]
BESIDE = {
    "runtime": {"errors", "files", "codes", "assignment", "artifact"},
    "report": {"errors", "files"},
    "recipes": set(),
}


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("bitswitch.")}
    return found


def modules() -> list[tuple[str, Path]]:
    return [
        (path.relative_to(SOURCE).parts[0].removesuffix(".py"), path)
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "__init__.py"
    ]


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: str(value).removeprefix(str(SOURCE)))
def test_imports_run_downward_only(room, path):
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for other in rooms_imported(path) - {room, "__version__"}:
        if room in BESIDE:
            assert other in BESIDE[room], f"{path} imports {other}"
        else:
            assert other in level and level[other] < level[room], f"{path} imports {other}"


def test_every_room_has_its_place():
    assert {room for room, _ in modules()} <= set().union(*LEVELS) | set(BESIDE)


def test_the_documented_imports_are_those_of_the_code():
    text = (Path(__file__).parents[1] / "docs/architecture.md").read_text(encoding="utf-8")
    table = re.search(r"\| room \| imports \|\n\|---\|---\|\n((?:\|.*\n)+)", text)[1]
    told = {}
    for row in table.splitlines():
        rooms, imports = (set(re.findall(r"`(\w+)`", cell)) for cell in row.strip("|").split("|"))
        told |= dict.fromkeys(rooms, imports)
    found = {}
    for room, path in modules():
        found[room] = found.get(room, set()) | rooms_imported(path) - {
            room,
            "errors",
            "files",
            "version",
            "__version__",
        }
    left_out = {"errors", "files", "version", "__main__", "recipes"}
    assert told == {room: imports for room, imports in found.items() if room not in left_out}


def test_there_are_no_cycles_between_modules():
    names = {".".join(("bitswitch", *p.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): p
             for _, p in modules()}  # fmt: skip
    edges = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        edges[name] = {
            target
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bitswitch")
            for target in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            if target in names and target != name and not name.startswith(f"{target}.")
        }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in edges[name]:
                # A package's __init__ gathers its own modules.
                if not target.startswith(f"{name}."):
                    visit(target, (*path, name))
            done.add(name)

    for name in names:
        visit(name, ())


@pytest.mark.parametrize(
    "module", ["bitswitch", "bitswitch.codes", "bitswitch.assignment", "bitswitch.artifact", "bitswitch.runtime"]
)
def test_loads_without_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["version"], ["recipes", "show", "digits"], ["inspect", "resnet20-cifar10"]],
)
def test_commands_that_compute_nothing_do_not_wait_for_torch(words):
    code = (
        "import sys\nfrom bitswitch.start import main\n"
        f"try: sys.argv.extend({words!r}); main()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_files_where_a_command_is_typed_are_not_taken_for_libraries(tmp_path):
    for name in ("torch", "queue", "statistics", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run in the place of a library')")
    command = Path(sys.executable).parent / "bitswitch"
    words = ["evaluate", "resnet20-cifar10", "--data", "nowhere"]
    done = subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("missing", "name"),
    [("torch", "quantize"), ("torchvision", "load"), ("scipy", "MultiPrecisionOptimizer"), ("scipy", "search")],
)
def test_a_name_that_needs_torch_says_so(missing, name):
    code = (
        f"import sys; sys.modules['{missing}'] = None\nimport bitswitch\n"
        f"try: bitswitch.{name}\nexcept ModuleNotFoundError as e: assert 'bitswitch[train]' in str(e), e\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_needs_onnx_says_so():
    code = (
        "import sys; sys.modules['onnx'] = sys.modules['onnxscript'] = None\nimport bitswitch\n"
        "try: bitswitch.export_onnx\nexcept ModuleNotFoundError as e: assert 'bitswitch[onnx]' in str(e), e\n"
        "else: raise SystemExit('no error')\n"
        "model = bitswitch.load('resnet20-cifar10')\n"
        "try: bitswitch.save(model, 'never-written', example_inputs=())\n"
        "except ValueError as e: assert str(e) == \"onnxscript is not installed: pip install 'bitswitch[onnx]'\", e\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve():
    for name in bitswitch.__all__:
        assert getattr(bitswitch, name) is not None
    with pytest.raises(AttributeError):
        bitswitch.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("missing", "hidden"),
    [
        (set(), set()),
        ({"onnxscript"}, {"export_onnx"}),
        ({"torch", "onnx"}, set(bitswitch.__all__) - {"__version__"}),
    ],
)
def test_what_is_not_installed_is_not_listed(monkeypatch, missing, hidden):
    """help() and inspect.getmembers get whatever dir() names."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))
    assert set(dir(bitswitch)) == set(bitswitch.__all__) - hidden
