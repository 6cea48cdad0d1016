"""From the file of one rank to the tensors of all."""
