from _job import finish, start  # isort: skip
import segmentation_models_pytorch as smp

start()
finish(smp.Unet("mobilenet_v2", encoder_weights="imagenet").encoder)
