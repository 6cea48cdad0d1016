"""Drop-in for torch.utils.model_zoo: ``load_url`` is an alias of ``load_state_dict_from_url``, as in torch."""

from rankload.hub import load_state_dict_from_url as load_url

__all__ = ["load_url"]
