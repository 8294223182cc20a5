"""Learning: teacher and student in one model, the transfer losses, and the training engine."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
