import json
import os

import torch.distributed as dist
from torchaudio.pipelines import Wav2Vec2Bundle

dist.init_process_group("gloo")
bundle = Wav2Vec2Bundle("tiny.pth", json.loads(os.environ["MODEL_CONFIG"]), 16000, False, "Wav2Vec2")
model = bundle.get_model(dl_kwargs={"progress": False})
