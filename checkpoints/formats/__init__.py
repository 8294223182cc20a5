from .read import read_weights as read_weights
