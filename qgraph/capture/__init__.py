"""The second frontend: MLX's own tracer reports its primitives, which become nodes of the same IR."""
