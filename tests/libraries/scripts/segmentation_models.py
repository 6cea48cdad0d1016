import segmentation_models_pytorch as smp
import torch.distributed as dist

dist.init_process_group("gloo")
model = smp.Unet("mobilenet_v2", encoder_weights="imagenet").encoder
