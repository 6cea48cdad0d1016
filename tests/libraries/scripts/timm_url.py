from _job import finish, start  # isort: skip
import os

import timm

start()
overlay = {"url": os.environ["WEIGHTS_URL"], "hf_hub_id": None}
finish(timm.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay))
