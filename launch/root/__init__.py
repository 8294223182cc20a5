"""GraftViT: make one vision transformer attend like another. The public names are imported when first used."""

from importlib.metadata import version

import lazy_loader

__version__ = version("graftvit")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
