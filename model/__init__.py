"""All that inference needs: one image in, three landmarks and the angle of progression out."""

import os

MAX_PIXELS = 64 * 2**20  # of a frame

# OpenCV's own guard behind ours. It reads the limit once, when it is imported.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
# Pydantic's search for plugins among all installed packages takes 25 ms of the start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")
