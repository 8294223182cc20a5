"""GraftViT: make one vision transformer attend like another. The public names are imported when first used.

load, load_pretrained    read a model from a run, a folder, a weights file, timm or the hub
as_model                 the model that an object holds or names: every function below takes such objects
convert                  replace the attention of a model by a plan of its layers
DualViT                  a student that frozen teachers teach, as a torch module for a loop of your own
Alignment                the losses of a converted model's layers against those of the original
RunConfig, train         a run as of `graftvit train`: its settings, and the run
attention_maps           what each layer attends to in a batch of images
visualize                pictures of it, also beside a teacher, in a notebook or a folder
evaluate                 accuracy of models, on a data set or on batches
compare_models           how two models differ, with what is known to make transfer fail
save, export, push       write a model as a folder that `load` reads, as ONNX or torch.export, or to the hub
deploy                   write a classifier as a file of another runtime, if it is as accurate

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
