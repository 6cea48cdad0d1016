"""torch.utils.model_zoo's surface: ``load_url`` is an alias, as it is in torch."""

from rankload.hub import load_state_dict_from_url as load_url

__all__ = ["load_url"]
