"""What every script ends with: one line that says what this rank has."""

import hashlib

import torch.distributed as dist


def digest_of(model):
    """A digest of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def finish(model):
    """Print the digest, and leave together."""
    print(f"weights: {digest_of(model)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
