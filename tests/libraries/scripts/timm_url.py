import timm
import torch.distributed as dist

dist.init_process_group("gloo")
overlay = {"url": "https://example.org/weights-0a1b2c3d.pth", "hf_hub_id": None}
model = timm.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay)
