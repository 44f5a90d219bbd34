"""Parameter trees of well-known shapes, filled with random numbers."""

import jax.numpy as jnp
import numpy as np


def resnet50(seed: int) -> dict:
    """The 25.6 million parameters of a ResNet-50 for ImageNet: kernels HWIO, BatchNorm scale and bias."""
    shapes: dict[str, tuple[int, ...]] = {"stem/conv/kernel": (7, 7, 3, 64), **norm("stem", 64)}
    channels = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            name, out = f"stage{stage}/block{block}", 4 * width
            sizes = {"conv1": (1, 1, channels, width), "conv2": (3, 3, width, width), "conv3": (1, 1, width, out)}
            if block == 0:
                sizes["shortcut"] = (1, 1, channels, out)
            for conv, shape in sizes.items():
                shapes |= {f"{name}/{conv}/kernel": shape, **norm(f"{name}/{conv}", shape[-1])}
            channels = out
    shapes |= {"head/kernel": (2048, 1000), "head/bias": (1000,)}
    draw = np.random.default_rng(seed).standard_normal  # on the host: nothing to compile for each shape
    return {path: jnp.asarray(np.float32(0.05) * draw(shape, np.float32)) for path, shape in shapes.items()}


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/norm/scale": (channels,), f"{name}/norm/bias": (channels,)}
