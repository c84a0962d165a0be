"""Running graphs: emission to MLX, programs, eager mode, and the NumPy reference."""
