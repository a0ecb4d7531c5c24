import hashlib

from peft import PeftModel
from torch import nn

from .sharding import part_of


def fingerprint(model: nn.Module) -> str:
    """
    Short text that tells one set of weights from another, from the first values of every parameter. Adapters in
    training, which may be initialised at random, are left out.

    That of the main process counts: where parameters are sharded, it holds their beginnings.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not (isinstance(model, PeftModel) and parameter.requires_grad):
            digest.update(f"{name} {part_of(parameter).flatten()[:4].float().tolist()}".encode())
    return digest.hexdigest()[:16]
