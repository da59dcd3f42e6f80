"""Inference: one image in, three landmarks and the angle of progression out."""

import os

MAX_PIXELS = 64 * 2**20  # in a frame

# OpenCV checks this limit too, behind our own check. It reads it once, when it is imported.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
# Pydantic would search all installed packages for plugins, which takes 25 ms at the start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")
