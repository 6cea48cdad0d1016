import math

import pytest
import torch

from crepe import Crepe, pitch_hz, tone


@pytest.mark.parametrize("capacity", ["tiny", "full"])
def test_published_weights_load_strictly_and_hear_the_pitch(weights, capacity):
    state_dict = torch.load(weights(capacity), weights_only=True)
    model = Crepe(capacity)
    assert list(model.state_dict()) == list(state_dict)
    model.load_state_dict(state_dict, strict=True)
    model.eval()
    for frequency_hz in (110.0, 440.0, 1000.0):
        with torch.inference_mode():
            activations = model(tone(frequency_hz, batch=3))
        assert activations.shape == (3, 360)
        for heard_hz in pitch_hz(activations).tolist():
            cents_off = 1200 * math.log2(heard_hz / frequency_hz)
            assert abs(cents_off) <= 20, f"{frequency_hz} Hz was heard as {heard_hz:.1f} Hz"


def test_unknown_capacity_is_refused_by_name():
    with pytest.raises(ValueError, match=r"full.*tiny.*'huge'"):
        Crepe("huge")
