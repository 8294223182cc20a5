"""GraftViT: make one vision transformer attend like another. The public names are imported when first used."""

import lazy_loader

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """`__version__` takes half of the time that a command needs to begin."""
    if name == "__version__":
        from importlib.metadata import version

        return version("graftvit")
    return _attribute(name)
