"""What a notebook session lacks is installed, and the platform's torch stays as it is.

python recipes/install.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "unsloth", "llama-cpp-python")


def read_requirements(path: Path) -> list[Requirement]:
    """What a requirements file lists, with what the files that it names list."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found += read_requirements(path.parent / line.removeprefix("-r ").strip())
        elif line:
            found.append(Requirement(line))
    return found


def installed(name: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_met(requirement: Requirement) -> bool:
    found = installed(requirement.name)
    return bool(found) and requirement.specifier.contains(found, prereleases=True)


def check_torch(requirements: list[Requirement]) -> None:
    """Raises RuntimeError where the torch that is there is outside the range."""
    torch = next(r for r in requirements if r.name == "torch")
    if installed("torch") and not is_met(torch):
        raise RuntimeError(
            f"this platform has torch {installed('torch')}, and tract-lite is made for torch "
            f"{torch.specifier}: choose another version of the platform's environment (on Colab "
            "'Runtime', 'Change runtime type'; on Kaggle 'Settings', 'Environment')"
        )


def install(file: Path) -> None:
    """Let pip install a requirements file around the torch that is there."""
    with TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        torch = installed("torch")
        constraints.write_text(f"torch=={torch}\n" if torch else "", encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "-r", str(file), "-c", str(constraints)], check=True
        )


def describe_hardware() -> str:
    """The precision that this machine trains in, and why.

    Raises:
        RuntimeError: the installed torch has no kernels for the card.
    """
    sys.path.insert(0, str(ROOT))
    from tract_lite.training.seed_model import pick_dtype

    dtype, reason = pick_dtype()
    return f"computes in {str(dtype).removeprefix('torch.')}: {reason}"


def has_gpu() -> bool:
    if not installed("torch"):
        return shutil.which("nvidia-smi") is not None
    import torch

    return torch.cuda.is_available()


def main() -> None:
    file = ROOT / ("requirements-gpu.txt" if has_gpu() else "requirements.txt")
    requirements = read_requirements(file)
    try:
        check_torch(requirements)
        if installed("torch"):
            # A card that won't do is found before minutes of installing.
            describe_hardware()
        missing = [str(requirement) for requirement in requirements if not is_met(requirement)]
        if missing:
            print(
                f"installing {', '.join(missing)}; llama-cpp-python is compiled, which takes some minutes", flush=True
            )
            install(file)
        else:
            print("nothing to install")
        print(", ".join(f"{name} {installed(name)}" for name in SHOWN if installed(name)))
        print(describe_hardware())
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
