from _job import finish, start  # isort: skip
import os

import open_clip

start()
open_clip.add_model_config(os.environ["MODEL_CONFIG"])
open_clip.pretrained._PRETRAINED["tiny"] = {"own": {"url": os.environ["WEIGHTS_URL"]}}
finish(open_clip.create_model("tiny", pretrained="own"))
