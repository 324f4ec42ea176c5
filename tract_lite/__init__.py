"""tract-lite: teach a language model to judge text with numbers, and run it from one GGUF file.

The public names stand in `__init__.pyi` and are imported on first use: judging needs no torch.
"""

import logging

import lazy_loader

from tract_lite.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# At its import it advises a package for inference on CPUs, which `training.seed_model` rules out.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
