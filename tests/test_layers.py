import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tract_lite"
# The way of the data: a module imports only from above it.
ORDER = """cache vocabulary scale spec sources records sampling prompt rail metrics jsonl disk
loss encode seed settings trainer preflight train adapter merge
llama converter llama_adapter draw slots engine torch_engine
server_http server_protocols server_text server_engine judgement judge judge_output judge_command
self_cot estimate parity gguf model_card report __main__""".split()
NEED_TORCH = {"encode", "loss", "seed", "trainer", "preflight", "train", "adapter", "merge", "torch_engine", "estimate"}
HEAVY = ("torch", "transformers", "peft", "datasets", "llama_cpp", "scipy", "matplotlib", "numpy")


def parse(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def imported(name: str) -> set[str]:
    """The package's modules that a module names in an import, anywhere in it."""
    modules = [node.module for node in ast.walk(parse(name)) if isinstance(node, ast.ImportFrom)]
    return {module.partition(".")[2] for module in modules if module.startswith("tract_lite.")}


def first_statement(function: ast.FunctionDef) -> ast.stmt:
    """The first one behind the docstring."""
    return function.body[ast.get_docstring(function) is not None and len(function.body) > 1]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_order_names_every_module():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *ORDER}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_above_it(name):
    assert imported(name) <= set(ORDER[: ORDER.index(name)])


def test_only_the_seed_knows_the_backends():
    for name in set(ORDER) - {"seed"}:
        assert "unsloth" not in (PACKAGE / f"{name}.py").read_text(encoding="utf-8").lower()


def test_the_other_modules_need_neither_torch_nor_transformers():
    names = [f"tract_lite.{name}" for name in ORDER if name not in NEED_TORCH]
    run_python(
        "import sys, importlib\n"
        "sys.modules |= {'torch': None, 'transformers': None}\n"
        f"for name in {names}: importlib.import_module(name)"
    )


def test_the_package_and_its_help_pull_in_nothing_heavy():
    code = (
        "import sys, tract_lite, tract_lite.__main__ as main\n"
        "try: main.main(['--version'])\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    version, heavy = done.stdout.splitlines()
    assert version.startswith("tract-lite ") and heavy == "[]"


def test_every_public_name_has_a_home():
    run_python("import tract_lite\nfor name in tract_lite.__all__: getattr(tract_lite, name)")


@pytest.mark.parametrize("name", ["__init__", *ORDER])
def test_modules_and_functions_stay_small(name):
    assert len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 260
    functions = [node for node in ast.walk(parse(name)) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if node.end_lineno - first_statement(node).lineno > 45]
    assert long == []
