"""Functions of tensors recorded once, operation by operation, and replayed without Python."""
