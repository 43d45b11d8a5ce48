"""What runs on the device: Python 3.8, numpy, Pillow, and tensorrt or onnxruntime; neither torch nor kdcompress."""
