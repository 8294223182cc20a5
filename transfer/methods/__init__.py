"""What a student takes from a teacher: the dual wrapper, the methods, and how layers, heads and tokens are paired."""
