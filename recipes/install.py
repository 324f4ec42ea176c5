"""What a notebook session lacks is installed, and the platform's torch stays as it is.

python recipes/install.py
"""

import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "unsloth", "llama-cpp-python")


def read_requirements(path: Path) -> list[Requirement]:
    """What a requirements file lists, with what the files that it names list."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    named = [part for line in lines if line.startswith("-r ") for part in read_requirements(path.parent / line[3:])]
    return named + [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def installed(name: str) -> str:
    """The installed version; empty where there is none."""
    with suppress(PackageNotFoundError):
        return version(name)
    return ""


def is_met(requirement: Requirement) -> bool:
    found = installed(requirement.name)
    return bool(found) and requirement.specifier.contains(found, prereleases=True)


def check_torch(requirements: list[Requirement]) -> None:
    """Raises RuntimeError where the torch that is there is outside the range."""
    torch = next(requirement for requirement in requirements if requirement.name == "torch")
    if installed("torch") and not is_met(torch):
        raise RuntimeError(
            f"this platform has torch {installed('torch')}, and tract-lite is made for torch {torch.specifier}: "
            "choose another environment (Colab: 'Runtime', 'Change runtime type'; Kaggle: 'Settings', 'Environment')"
        )


def install(file: Path) -> None:
    """Let pip install a requirements file around the torch that is there."""
    kept = [f"torch=={there}"] if (there := installed("torch")) else []
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", str(file), *kept], check=True)


def describe_hardware() -> str:
    """The precision that this machine computes in, and why.
    Raises RuntimeError: the installed torch has no kernels for the card.
    """
    sys.path.insert(0, str(ROOT))
    from tract_lite import pick_dtype

    dtype, reason = pick_dtype()
    return f"computes in {str(dtype).removeprefix('torch.')}: {reason}"


def main() -> None:
    has_gpu = shutil.which("nvidia-smi") is not None
    file = ROOT / ("requirements-gpu.txt" if has_gpu else "requirements.txt")
    requirements = read_requirements(file)
    try:
        check_torch(requirements)
        # A card that won't do is best found before minutes of installing.
        with suppress(ModuleNotFoundError):
            describe_hardware()
        if missing := [str(requirement) for requirement in requirements if not is_met(requirement)]:
            print(f"installing {', '.join(missing)}; to compile llama-cpp-python takes some minutes", flush=True)
            install(file)
        else:
            print("nothing to install")
        print(", ".join(f"{name} {installed(name)}" for name in SHOWN if installed(name)))
        print(describe_hardware())
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
