"""What is learned: the dual teacher-student wrapper, the transfer losses, and the engine that trains."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
