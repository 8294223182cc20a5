"""Read and write: teachers from any source, students in timm's layout, training state."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
