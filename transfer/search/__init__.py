"""Search for attention programs that take over a teacher's attention."""
