import os

import open_clip
import torch.distributed as dist

dist.init_process_group("gloo")
open_clip.add_model_config(os.environ["MODEL_CONFIG"])
open_clip.pretrained._PRETRAINED["tiny"] = {"own": {"url": "https://example.org/weights-0a1b2c3d.pth"}}
model = open_clip.create_model("tiny", pretrained="own")
