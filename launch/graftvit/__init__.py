"""GraftViT: make one vision transformer attend like another. The public names are imported when first used."""

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
