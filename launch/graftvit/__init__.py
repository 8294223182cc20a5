"""GraftViT: make one vision transformer attend like another. The public names are imported when first used.

load, load_pretrained    read a model from a run, a folder, a weights file, timm or the hub
convert                  replace the attention of a model by a plan of its layers
DualViT                  a student that frozen teachers teach, as a torch module for a loop of your own
RunConfig, train         a run as of `graftvit train`: its settings, and the run
save             write a model as a folder that `load` reads

help(graftvit.DualViT) and help(graftvit.RunConfig) explain the two classes; `graftvit --help` lists the commands.
"""

import lazy_loader

_lazy = lazy_loader.attach_stub(__name__, __file__)
__all__ = _lazy[2]


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name. The version is read on demand: it takes half of the time in which a command begins."""
    if name == "__version__":
        from importlib.metadata import version

        return version("graftvit")
    return _lazy[0](name)
