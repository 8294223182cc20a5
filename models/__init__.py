"""Models: the supported families, attention operators, and the host that runs an operator."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
