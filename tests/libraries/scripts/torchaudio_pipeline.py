from _job import finish, start  # isort: skip
import json
import os

from torchaudio.pipelines import Wav2Vec2Bundle

start()
bundle = Wav2Vec2Bundle("tiny.pth", json.loads(os.environ["MODEL_CONFIG"]), 16000, False, "Wav2Vec2")
finish(bundle.get_model(dl_kwargs={"progress": False}))
