"""The map of rooms: what may know what, what needs torch, and what stands where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Iterator

import pytest

import tract_lite

ROOT = Path(__file__).parents[1]
PACKAGE, RECIPES = ROOT / "tract_lite", ROOT / "recipes"
# Each imports only from those before it; a package counts as one.
ROOMS = """version vocabulary scale spec record prompt rail loss judgement metrics data errors
training options engines judge judge_file self_cot export estimate run report presets __main__""".split()
NEED_TORCH = """loss.cot_raft loss.label_trees loss.projection training.branches
training.encode training.layers training.precision training.preflight training.seed_model
training.stage training.toy_seed_model training.trainer engines.transformers estimate
export.adapter export.exportable export.gguf export.merge export.parity
export.reasoning_judge export.rehearsal""".split()
HEAVY = "torch transformers peft datasets pyarrow llama_cpp scipy matplotlib numpy jinja2".split()
PUBLIC = sorted(tract_lite.__all__)


def modules() -> dict[str, Path]:
    """The files of the package by module, without its name: `export.gguf`."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in files.items() if not name.endswith("__init__")}


def imports(path: Path) -> Iterator[str]:
    """What a file imports, anywhere in it, as whole names: `tract_lite.export.gguf.export_gguf`."""
    package = ["tract_lite", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{base}.{name.name}" for name in node.names)


def texts_in(path: Path) -> set[str]:
    """The string constants of a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def modules_known_to(path: Path) -> set[str]:
    """The package's modules that a file imports from."""
    known = modules()
    names = (name.removeprefix("tract_lite.") for name in imports(path) if name.startswith("tract_lite."))
    return {
        max((known_one for known_one in known if f"{name}.".startswith(f"{known_one}.")), key=len) for name in names
    }


def room_of(module: str) -> str:
    return module.partition(".")[0]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_map_names_every_room() -> None:
    assert sorted(ROOMS) == sorted({room_of(module) for module in modules()})
    assert {path.parent.name for path in PACKAGE.rglob("__init__.py")} < {"tract_lite", *ROOMS}


def test_the_map_for_contributors_is_this_one() -> None:
    rows = re.findall(r"^\| (`.+`) \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = [(name.rstrip("/"), text) for rooms, text in rows for name in re.findall(r"`([\w/]+)`", rooms)]
    assert ["version", *(name for name, _ in named)] == ROOMS
    for room, text in named:
        inside = {module.partition(".")[2] for module in modules() if module.startswith(f"{room}.")}
        assert inside <= set(re.findall(r"`(\w+)`", text)), room


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_knows_only_rooms_before_its_own(module: str) -> None:
    before = ROOMS[: ROOMS.index(room_of(module)) + 1]
    assert {room_of(known) for known in modules_known_to(modules()[module])} <= set(before)


def test_no_circle_runs_through_the_package() -> None:
    TopologicalSorter({module: modules_known_to(path) for module, path in modules().items()}).prepare()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_knows_only_public_names(path: Path) -> None:
    own = [name for name in imports(path) if name.startswith("tract_lite")]
    assert set(own) <= {f"tract_lite.{name}" for name in PUBLIC}


@pytest.mark.parametrize("folder", sorted(path.parent for path in PACKAGE.rglob("*/__init__.py")), ids=lambda f: f.name)
def test_the_door_of_a_room_holds_nothing(folder: Path) -> None:
    assert not list(imports(folder / "__init__.py"))


def test_only_run_knows_the_names_of_a_runs_files() -> None:
    texts = {module: texts_in(path) for module, path in modules().items()}
    names = {text for text in texts.pop("run") if re.fullmatch(r"[\w*-]+\.\w+", text)} - {"trainer_state.json"}
    assert {"settings.json", "held_out.jsonl", "report.png", "adapter.gguf", "judge-*.gguf"} <= names
    assert {module: texts[module] & names for module in texts if texts[module] & names} == {}


def test_only_the_seed_model_knows_the_backends() -> None:
    for module, path in modules().items():
        named = {*texts_in(path), *imports(path)} if module != "training.seed_model" else set()
        # A name on the hub is none of the program.
        assert not [name for name in named if re.search(r"unsloth(?!/\w)", name, re.IGNORECASE)], module


def test_judging_needs_neither_torch_nor_transformers() -> None:
    names = [f"tract_lite.{module}" for module in modules() if module not in NEED_TORCH]
    run_python(
        "import sys, importlib\n"
        "sys.modules |= dict.fromkeys(['torch', 'transformers', 'peft', 'accelerate'])\n"
        f"for name in {names}: importlib.import_module(name)"
    )


@pytest.mark.parametrize("module", NEED_TORCH)
def test_what_is_said_to_need_torch_does(module: str) -> None:
    reached, todo = set(), {module}
    while todo:
        path = modules()[todo.pop()]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        reached |= {name.partition(".")[0] for name in imports(path)}
        at_top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
        todo |= {name.removeprefix("tract_lite.") for name in at_top if name.startswith("tract_lite.")}
    assert reached & {"torch", "transformers", "peft"}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["judge", "--help"], ["train", "--help"]])
def test_the_package_and_its_help_pull_in_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys, tract_lite, tract_lite.__main__ as main\nif {arguments}: main.main({arguments})"
    report = f"try:\n    exec({code!r})\nfinally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{report}"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_every_public_name_has_a_home() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    named = [(name.name, name.asname) for node in stub.body for name in node.names]
    assert all(name == shown for name, shown in named)
    assert sorted(name for name, _ in named) == PUBLIC
    assert all(getattr(tract_lite, name) is not None for name in PUBLIC)


def test_names_that_are_not_public_are_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        tract_lite.no_such_name  # noqa: B018
