from _job import finish, start  # isort: skip
import os

import torchvision

start()
weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
object.__setattr__(weights.value, "url", os.environ["WEIGHTS_URL"])  # its own names a host that a test cannot reach
finish(torchvision.models.shufflenet_v2_x0_5(weights=weights, progress=False))
